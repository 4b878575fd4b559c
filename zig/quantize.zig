//! Quantization by itself: rows packed as the keys of pages of 64 rows, one page after the other.
//! Called by abi.zig; calls encode.zig.
const std = @import("std");
const encode = @import("encode.zig");
const format = @import("format.zig");
const rotate_file = @import("rotate.zig");
const Half = format.Half;

pub fn half_of(f: format.Format, dim: u32, rotated: bool) Half {
    var half: Half = .{ .format = f, .dim = dim, .slots = format.page_tokens, .rotated = false };
    half.rotated = rotated and half.quantized();
    return half;
}

/// Bytes of `rows` rows: whole pages for quantized formats, rows alone for floating point.
pub fn bytes(half: Half, rows: u64) error{OutOfMemory}!u64 {
    if (!half.quantized()) return std.math.mul(u64, rows, half.row_bytes()) catch error.OutOfMemory;
    const pages = rows / format.page_tokens + @intFromBool(rows % format.page_tokens != 0);
    return std.math.mul(u64, pages, half.bytes()) catch error.OutOfMemory;
}

/// `row` has room for the stored dimension.
pub fn pack(half: Half, source: [*]const f32, rows: usize, target: [*]u8, row: []f32) void {
    if (half.quantized()) @memset(target[0..@intCast(bytes(half, rows) catch unreachable)], 0);
    for (0..rows) |i| {
        @memcpy(row[0..half.dim], source[i * half.dim ..][0..half.dim]);
        @memset(row[half.dim..], 0);
        if (half.rotated) rotate_file.rotate(row);
        const at = place(half, i);
        encode.encode_token(half, .key, target + at.page, at.slot, row);
    }
}

pub fn unpack(half: Half, source: [*]const u8, rows: usize, target: [*]f32, row: []f32) void {
    for (0..rows) |i| {
        const at = place(half, i);
        encode.decode_token(half, .key, source + at.page, at.slot, row);
        if (half.rotated) rotate_file.rotate(row);
        @memcpy(target[i * half.dim ..][0..half.dim], row[0..half.dim]);
    }
}

fn place(half: Half, row: usize) struct { page: usize, slot: usize } {
    if (!half.quantized()) return .{ .page = 0, .slot = row };
    return .{ .page = row / format.page_tokens * half.bytes(), .slot = row % format.page_tokens };
}

test "rows come back within a step" {
    const half = half_of(.q8, 48, true);
    var source: [70 * 48]f32 = undefined;
    var prng = std.Random.DefaultPrng.init(5);
    for (&source) |*x| x.* = prng.random().floatNorm(f32);
    var target: [2 * 64 * 64 * 2]u8 align(64) = undefined;
    var row: [64]f32 = undefined;
    pack(half, &source, 70, &target, &row);
    var back: [70 * 48]f32 = undefined;
    unpack(half, &target, 70, &back, &row);
    for (source, back) |a, b| try std.testing.expectApproxEqAbs(a, b, 0.1);
}
