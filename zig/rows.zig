//! Reads rows of keys or values where they lie, in any of four element types, and makes them what
//! the tail holds: checked, rounded, padded, and rotated for tiers that want it. Called by
//! input.zig and fill.zig through the kernel table.
const std = @import("std");
const builtin = @import("builtin");
const abi = @import("abi.zig");
const ahead_file = @import("ahead.zig");
const rotate = @import("rotate.zig");
const vec = @import("vec.zig");
const Ahead = ahead_file.Ahead;
const Half = @import("format.zig").Half;

/// Rows of `dim` elements, `stride_bytes` apart.
pub const Rows = extern struct {
    first: usize,
    stride_bytes: isize,
    dtype: u32, // abi.Dtype
    count: usize,
    dim: usize,

    pub const none: Rows = .{ .first = 0, .stride_bytes = 0, .dtype = 0, .count = 0, .dim = 0 };

    fn row(rows: *const Rows, i: usize) [*]const u8 {
        const distance = @as(isize, @intCast(i)) *% rows.stride_bytes;
        return @ptrFromInt(rows.first +% @as(usize, @bitCast(distance)));
    }

    /// Asks for a row, into the first-level cache (3) or the second (2).
    inline fn fetch(rows: *const Rows, i: usize, row_bytes: usize, comptime locality: u2) void {
        if (builtin.cpu.arch.isWasm() or i >= rows.count) return;
        const source = rows.row(i);
        var at: usize = 0;
        while (at < row_bytes) : (at += ahead_file.line_bytes) {
            @prefetch(source + at, .{ .locality = locality, .cache = .data });
        }
    }

    fn row_bytes_of(rows: *const Rows) usize {
        return rows.dim * switch (@as(abi.Dtype, @fromBackingInt(rows.dtype))) {
            inline else => |dtype| @as(usize, @sizeOf(Element(dtype))),
        };
    }
};

/// What is read and what is written next.
pub const Next = extern struct {
    rows: Rows,
    target: Ahead,

    pub const none: Next = .{ .rows = .none, .target = .none };

    /// To be fetched in `turns` equal parts while something else is computed.
    pub fn over(next: *const Next, turns: usize) Spread {
        return .{
            .rows = &next.rows,
            .row_bytes = next.rows.row_bytes_of(),
            .row = 0,
            .turns = turns,
            .credit = 0,
            .target = next.target.over(turns),
        };
    }
};

pub const Spread = struct {
    rows: *const Rows,
    row_bytes: usize,
    row: usize,
    turns: usize,
    credit: usize,
    target: ahead_file.Spread,

    pub inline fn turn(spread: *Spread) void {
        spread.credit += spread.rows.count;
        while (spread.credit >= spread.turns) {
            spread.rows.fetch(spread.row, spread.row_bytes, 2);
            spread.row += 1;
            spread.credit -= spread.turns;
        }
        spread.target.turn();
    }
};

/// Rows that a floating-point half holds, `dim` values of each.
pub fn of_half(half: Half, first: [*]const u8, count: usize, dim: usize) Rows {
    const dtype: abi.Dtype = switch (half.format) {
        .f32 => .f32,
        .f16 => .f16,
        .bf16 => .bf16,
        else => unreachable, // these have no rows
    };
    return .{
        .first = @intFromPtr(first),
        .stride_bytes = @intCast(half.row_bytes()),
        .dtype = @backingInt(dtype),
        .count = count,
        .dim = dim,
    };
}

pub fn Element(comptime dtype: abi.Dtype) type {
    return switch (dtype) {
        .f32 => f32,
        .f16, .bf16 => u16, // their bits
        .f64 => f64,
    };
}

inline fn convert(comptime dtype: abi.Dtype, comptime n: usize, at: [*]const u8) @Vector(n, f32) {
    const source = vec.load(@Vector(n, Element(dtype)), at);
    return switch (dtype) {
        .f32 => source,
        .f16 => vec.from_f16(n, source),
        .bf16 => vec.from_bf16(n, source),
        .f64 => @floatCast(source),
    };
}

pub const CheckArgs = extern struct { rows: Rows, limit: f32 };

/// Whether all magnitudes are numbers up to `limit`.
pub fn check(args: *const CheckArgs) bool {
    return switch (@as(abi.Dtype, @fromBackingInt(args.rows.dtype))) {
        inline else => |dtype| check_rows(dtype, &args.rows, args.limit),
    };
}

fn check_rows(comptime dtype: abi.Dtype, rows: *const Rows, limit: f32) bool {
    const size = @sizeOf(Element(dtype));
    var highest: Highest = .{};
    for (0..rows.count) |r| {
        const source = rows.row(r);
        var i: usize = 0;
        while (i + vec.lanes <= rows.dim) : (i += vec.lanes) {
            highest.see(convert(dtype, vec.lanes, source + i * size));
        }
        while (i < rows.dim) : (i += 1) highest.see_one(convert(dtype, 1, source + i * size));
    }
    return highest.within(limit);
}

/// The highest magnitude so far. As integers, magnitudes are in order, infinities above all numbers
/// and NaN above them.
const Highest = struct {
    bits: vec.U = @splat(0),

    inline fn see(highest: *Highest, x: vec.F) void {
        highest.bits = @max(highest.bits, @as(vec.U, @bitCast(@abs(x))));
    }

    inline fn see_one(highest: *Highest, x: @Vector(1, f32)) void {
        highest.see(@splat(x[0]));
    }

    inline fn within(highest: *const Highest, limit: f32) bool {
        return @reduce(.Max, highest.bits) <= @as(u32, @bitCast(limit));
    }
};

pub const ReadArgs = extern struct {
    rows: Rows,
    /// Of the rows, so many from one on, in the order in which they are taken.
    first: usize = 0,
    count: usize,
    /// Whether four rows that follow each other are followed by those 16, 32 and 48 further on.
    in_quads: bool = false,
    /// (row, dim_stored) f32
    target: [*]f32,
    dim_stored: usize,
    /// What the tail rounds to.
    tail_format: u32,
    rotated: bool,
    limit: f32,

    /// Where the row is that is taken at some place of the order.
    inline fn place(args: *const ReadArgs, i: usize) usize {
        if (!args.in_quads) return i;
        return i / 16 * 4 + i % 16 / 4 * 16 + i % 4;
    }

    /// Asks for a row some places ahead, if that is another one.
    inline fn fetch(args: *const ReadArgs, i: usize, row_bytes: usize) void {
        if (i < args.rows.count) args.rows.fetch(args.place(i), row_bytes, 3);
    }
};

/// Returns whether all magnitudes are numbers up to `limit`.
pub fn read(args: *const ReadArgs) bool {
    return switch (@as(abi.Dtype, @fromBackingInt(args.rows.dtype))) {
        inline else => |dtype| switch (@as(abi.Format, @fromBackingInt(args.tail_format))) {
            inline .f32, .f16, .bf16 => |tail| read_rows(dtype, tail, args),
            else => unreachable, // config.zig
        },
    };
}

fn read_rows(comptime dtype: abi.Dtype, comptime tail: abi.Format, given: *const ReadArgs) bool {
    const args = given.*; // which the rows that are written cannot be
    const size = @sizeOf(Element(dtype));
    const dim = args.rows.dim;
    if (args.rotated and args.dim_stored == dim) switch (dim) {
        inline 64, 128 => |n| return read_rotated(dtype, tail, n / vec.lanes, &args),
        else => {},
    };
    var highest: Highest = .{};
    for (0..args.count) |r| {
        args.fetch(args.first + r + rows_ahead, dim * size);
        const source = args.rows.row(args.place(args.first + r));
        const target = args.target[r * args.dim_stored ..][0..args.dim_stored];
        var i: usize = 0;
        while (i + vec.lanes <= dim) : (i += vec.lanes) {
            const x = convert(dtype, vec.lanes, source + i * size);
            highest.see(x);
            vec.store(target.ptr + i, round(tail, vec.lanes, x));
        }
        while (i < dim) : (i += 1) {
            const x = convert(dtype, 1, source + i * size);
            highest.see_one(x);
            target[i] = round(tail, 1, x)[0];
        }
        if (dim < target.len) @memset(target[dim..], 0);
        if (args.rotated) rotate.rotate(target);
    }
    return highest.within(args.limit);
}

/// Rows that are one block of the rotation: they stay in registers.
fn read_rotated(
    comptime dtype: abi.Dtype,
    comptime tail: abi.Format,
    comptime count: usize,
    given: *const ReadArgs,
) bool {
    const args = given.*;
    const size = @sizeOf(Element(dtype));
    const dim = count * vec.lanes;
    var highest: Highest = .{};
    for (0..args.count) |r| {
        args.fetch(args.first + r + rows_ahead, dim * size);
        const source = args.rows.row(args.place(args.first + r));
        const target = args.target + r * dim;
        var v: [count]vec.F = undefined;
        inline for (&v, 0..) |*x, i| {
            const whole = convert(dtype, vec.lanes, source + i * vec.lanes * size);
            highest.see(whole);
            x.* = round(tail, vec.lanes, whole);
        }
        rotate.rotate_vectors(count, &v);
        inline for (v, 0..) |x, i| vec.store(target + i * vec.lanes, x);
    }
    return highest.within(args.limit);
}

/// Rows lie far apart, where the processor does not look ahead by itself.
const rows_ahead = 6;

pub const StoreArgs = extern struct {
    rows: Rows,
    /// (row, dim_stored) in the format of the tail
    target: [*]u8,
    dim_stored: usize,
    limit: f32,
};

/// Rows as a floating-point half holds them: rounded, padded with zeros. Returns whether all
/// magnitudes are numbers up to `limit`.
pub fn store(comptime T: type, args: *const StoreArgs) bool {
    return switch (@as(abi.Dtype, @fromBackingInt(args.rows.dtype))) {
        inline else => |dtype| store_rows(T, dtype, args),
    };
}

fn store_rows(comptime T: type, comptime dtype: abi.Dtype, args: *const StoreArgs) bool {
    const size = @sizeOf(Element(dtype));
    const stored_size = @sizeOf(T.Element);
    const dim = args.rows.dim;
    var highest: Highest = .{};
    for (0..args.rows.count) |r| {
        args.rows.fetch(r + rows_ahead, dim * size, 3);
        const source = args.rows.row(r);
        const target = args.target + r * args.dim_stored * stored_size;
        var i: usize = 0;
        while (i + vec.lanes <= dim) : (i += vec.lanes) {
            const x = convert(dtype, vec.lanes, source + i * size);
            highest.see(x);
            T.store(target + i * stored_size, x);
        }
        if (i == args.dim_stored) continue;
        var rest: [vec.lanes]f32 = @splat(0);
        for (i..dim) |k| rest[k - i] = convert(dtype, 1, source + k * size)[0];
        highest.see(rest);
        T.store(target + i * stored_size, rest);
    }
    return highest.within(args.limit);
}

inline fn round(comptime tail: abi.Format, comptime n: usize, x: @Vector(n, f32)) @Vector(n, f32) {
    return switch (tail) {
        .f16 => vec.from_f16(n, vec.to_f16(n, x)),
        .bf16 => vec.from_bf16(n, vec.to_bf16(n, x)),
        else => x,
    };
}

test "rows of every type are read, padded and checked" {
    const source = [_]f32{ 1, -2, 3, 4, 5, 6 };
    var target: [32]f32 = undefined;
    const rows: Rows = .{
        .first = @intFromPtr(&source),
        .stride_bytes = 12,
        .dtype = 0,
        .count = 2,
        .dim = 3,
    };
    const f16_tail = @backingInt(abi.Format.f16);
    const args: ReadArgs = .{
        .rows = rows,
        .count = 2,
        .target = &target,
        .dim_stored = 16,
        .tail_format = f16_tail,
        .rotated = false,
        .limit = 6,
    };
    try std.testing.expect(read(&args));
    try std.testing.expectEqualSlices(f32, &.{ 1, -2, 3, 0 }, target[0..4]);
    try std.testing.expectEqualSlices(f32, &.{ 4, 5, 6, 0 }, target[16..20]);
    try std.testing.expect(check(&.{ .rows = rows, .limit = 6 }));
    try std.testing.expect(!check(&.{ .rows = rows, .limit = 5 }));
}
