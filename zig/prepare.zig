//! Turns query rows into what the score kernels read: scaled (and rotated) f32 for floating-point
//! keys, int8 planes for integer keys. Called by attend.zig through the kernel table.
const std = @import("std");
const vec = @import("vec.zig");
const format = @import("format.zig");
const rotate = @import("rotate.zig");
const F = vec.F;
const I = vec.I;

/// Query rows prepared for the key half of one tier. Dimensions are padded with zeros to `dim`, a
/// multiple of 32. A row's 14-bit integers are split into two planes of int8: value = high * 128 +
/// low.
pub const Query = extern struct {
    dim: usize,
    /// (row, dim) f32
    values: [*]f32,
    /// (row, plane, dim / 4): four int8 a word; plane 0 is the high one, or the only one
    planes: [*]i32,
    /// (row, group): what one unit of the integers is worth
    scales: [*]f32,
    /// (row, group): sum of the integers
    sums: [*]i32,

    pub fn groups(q: *const Query) usize {
        return q.dim / format.group;
    }
};

pub const PrepareArgs = extern struct {
    /// Raw query row, `source_dim` values.
    source: [*]const f32,
    source_dim: usize,
    /// Softmax scale with everything that can be folded into it.
    factor: f32,
    rotated: bool,
    row: usize,
    query: *const Query,
};

/// Fills row `args.row` of `args.query` for keys of format `T`.
pub fn prepare(comptime T: type, args: *const PrepareArgs) void {
    const q = args.query;
    const values = q.values[args.row * q.dim ..][0..q.dim];
    scale(args.source[0..args.source_dim], args.factor, values.ptr);
    @memset(values[args.source_dim..], 0);
    if (args.rotated) rotate.rotate(values);
    if (!T.quantized) return;

    const planes = T.query_planes;
    const words = q.dim / 4;
    const row_planes = q.planes + args.row * 2 * words;
    const limit: f32 = if (planes == 1) 127 else 63 * 128 + 63;
    const whole_row = if (planes == 2) largest(values) else 0;
    for (0..q.groups()) |g| {
        const part = values[g * format.group ..][0..format.group];
        const top = if (planes == 2) whole_row else largest(part);
        // The reciprocal of a subnormal would be infinite; such a query is zero beside any key.
        const inverse: f32 = if (top > 1e-30) limit / top else 0;
        q.scales[args.row * q.groups() + g] = top / limit;
        var sum: I = @splat(0);
        inline for (0..format.group / vec.lanes) |i| {
            const x = vec.load(F, part.ptr + i * vec.lanes);
            const integers = vec.round_to_int(x * vec.splat(inverse));
            sum +%= integers;
            const low = if (planes == 1) integers else low_plane(integers);
            const at = g * format.group / 4 + i * vec.lanes / 4;
            vec.store(row_planes + (planes - 1) * words + at, @as(@Vector(16, i8), @truncate(low)));
            if (planes == 2) vec.store(row_planes + at, high_plane(integers, low));
        }
        q.sums[args.row * q.groups() + g] = @reduce(.Add, sum);
    }
}

fn scale(source: []const f32, factor: f32, target: [*]f32) void {
    var i: usize = 0;
    while (i + vec.lanes <= source.len) : (i += vec.lanes) {
        vec.store(target + i, vec.load(F, source.ptr + i) * vec.splat(factor));
    }
    while (i < source.len) : (i += 1) target[i] = source[i] * factor;
}

/// The low seven bits as a signed number, so that both planes stay within [-64, 64].
pub inline fn low_plane(integers: I) I {
    return ((integers +% @as(I, @splat(64))) & @as(I, @splat(127))) -% @as(I, @splat(64));
}

pub inline fn high_plane(integers: I, low: I) @Vector(16, i8) {
    return @truncate((integers -% low) >> @splat(7));
}

fn largest(values: []const f32) f32 {
    var top = vec.splat(0);
    var i: usize = 0;
    while (i < values.len) : (i += vec.lanes) top = vec.max(top, @abs(vec.load(F, values.ptr + i)));
    return vec.reduce(.max, top);
}

test "planes add up to the rounded query" {
    var values: [64]f32 = undefined;
    var planes: [32]i32 = undefined;
    var scales: [2]f32 = undefined;
    var sums: [2]i32 = undefined;
    var source: [50]f32 = undefined;
    var prng = std.Random.DefaultPrng.init(4);
    for (&source) |*x| x.* = prng.random().floatNorm(f32);
    const query: Query = .{
        .dim = 64,
        .values = &values,
        .planes = &planes,
        .scales = &scales,
        .sums = &sums,
    };
    prepare(
        format.Q8,
        &.{
            .source = &source,
            .source_dim = 50,
            .factor = 0.5,
            .rotated = false,
            .row = 0,
            .query = &query,
        },
    );
    const high: *const [64]i8 = @ptrCast(planes[0..16]);
    const low: *const [64]i8 = @ptrCast(planes[16..32]);
    for (source, 0..) |x, i| {
        const integer: f32 = @floatFromInt(@as(i32, high[i]) * 128 + low[i]);
        try std.testing.expectApproxEqAbs(x * 0.5, integer * scales[0], 0.51 * scales[0]);
    }
}
