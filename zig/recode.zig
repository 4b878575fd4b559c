//! From one format into another: tokens that go from the warm tier to the store, and what `convert`
//! changes. Rows stay in the space in which they are held, rotated or not, as long as both sides
//! hold them in the same. Called by fill.zig, convert.zig and quality.zig; calls encode.zig.
const std = @import("std");
const dispatch = @import("dispatch.zig");
const encode_file = @import("encode.zig");
const encode_k = @import("encode_k.zig");
const format = @import("format.zig");
const rotate = @import("rotate.zig");
const Half = format.Half;
const Next = @import("rows.zig").Next;
const Side = format.Side;

/// The values of `count` tokens from `slot` on, as they are held, into (count, stored dim).
pub fn decode(
    half: Half,
    comptime side: Side,
    base: [*]const u8,
    slot: usize,
    count: usize,
    rows: [*]f32,
) void {
    const dim = half.dim_stored();
    for (0..count) |i| {
        encode_file.decode_token(half, side, base, slot + i, rows[i * dim ..][0..dim]);
    }
}

/// Gives a page the offset that suits `count` rows, if the half has one.
pub fn set_offsets(half: Half, base: [*]u8, count: usize, rows: [*]f32) void {
    if (!half.centred) return;
    dispatch.table().store_offsets(&offset_args(half, base, count, rows));
}

fn offset_args(half: Half, base: [*]u8, count: usize, rows: [*]f32) encode_k.OffsetArgs {
    return .{
        .rows = rows,
        .count = count,
        .dim = half.dim_stored(),
        .offsets = @constCast(half.offsets(base)),
    };
}

/// Packs `count` rows (count, stored dim) into the slots from `slot` on of a page which has its
/// offset. The rows are used up.
pub fn encode(
    half: Half,
    comptime side: Side,
    base: [*]u8,
    slot: usize,
    count: usize,
    rows: [*]f32,
) void {
    encode_and_fetch(half, side, base, slot, count, rows, .none);
}

/// The same, while what comes next is fetched.
pub fn encode_and_fetch(
    half: Half,
    comptime side: Side,
    base: [*]u8,
    slot: usize,
    count: usize,
    rows: [*]f32,
    ahead: Next,
) void {
    const dim = half.dim_stored();
    const table = dispatch.table();
    if (half.centred) table.subtract_offsets(&offset_args(half, base, count, rows));
    if (half.quantized() and count == format.page_tokens) {
        const f = @backingInt(half.format);
        const encoder = if (side == .key) table.encode_keys[f] else table.encode_values[f];
        return encoder.?(&.{ .half = base, .rows = rows, .dim = dim, .ahead = ahead });
    }
    for (0..count) |i| {
        encode_file.encode_token(half, side, base, slot + i, rows[i * dim ..][0..dim]);
    }
}

/// Copies the stored bits of one token between pages of one format, slot to slot.
pub fn copy(
    half: Half,
    comptime side: format.Side,
    source: [*]const u8,
    target: []u8,
    slot: usize,
) void {
    switch (half.format) {
        inline else => |tag| {
            const T = format.all[@backingInt(tag)];
            if (!T.quantized) {
                const bytes = half.row_bytes();
                @memcpy(target[slot * bytes ..][0..bytes], source[slot * bytes ..][0..bytes]);
                return;
            }
            for (0..half.dim_stored()) |dim| {
                T.set(side, target.ptr, slot, dim, T.get(side, source, slot, dim));
            }
            for (0..half.groups()) |g| {
                const size = @sizeOf(T.Scale);
                const at = half.code_bytes() + (g * format.page_tokens + slot) * size;
                @memcpy(target[at..][0..size], source[at..][0..size]);
            }
        },
    }
}

/// Makes rows as `from` holds them rows as `to` holds them; `rows` has room for the wider ones.
pub fn change_space(from: Half, to: Half, count: usize, rows: [*]f32) void {
    if (from.rotated and to.rotated) return;
    const old = from.dim_stored();
    const new = to.dim_stored();
    if (from.rotated) for (0..count) |i| rotate.rotate(rows[i * old ..][0..old]);
    for (0..count) |index| {
        // Wider rows move from the last one on, so that none is overwritten.
        const i = if (new > old) count - 1 - index else index;
        @memmove(rows[i * new ..][0..from.dim], rows[i * old ..][0..from.dim]);
        @memset(rows[i * new + from.dim ..][0 .. new - from.dim], 0);
    }
    if (to.rotated) for (0..count) |i| rotate.rotate(rows[i * new ..][0..new]);
}

test "rows change their space, their width and back" {
    const plain: Half = .{ .format = .f16, .dim = 70, .slots = 64, .rotated = false };
    const rotated: Half = .{ .format = .q4, .dim = 70, .slots = 64, .rotated = true };
    var rows: [3 * 96]f32 = undefined;
    for (0..3) |i| for (0..80) |d| {
        rows[i * 80 + d] = if (d < 70) @floatFromInt(i * 100 + d) else 0;
    };
    change_space(plain, rotated, 3, &rows);
    change_space(rotated, plain, 3, &rows);
    for (0..3) |i| for (0..80) |d| {
        const expected: f32 = if (d < 70) @floatFromInt(i * 100 + d) else 0;
        try std.testing.expectApproxEqAbs(expected, rows[i * 80 + d], 1e-3);
    };
}
