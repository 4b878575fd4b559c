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

    const groups = q.groups();
    const whole_row = if (T.query_planes == 2) largest(values) else 0;
    var first: usize = 0;
    while (first + groups_at_once <= groups) : (first += groups_at_once) {
        prepare_groups(T, groups_at_once, args, first, whole_row);
    }
    while (first < groups) : (first += 1) prepare_groups(T, 1, args, first, whole_row);
}

/// Groups whose reductions are made together.
const groups_at_once = 4;

fn prepare_groups(
    comptime T: type,
    comptime count: usize,
    args: *const PrepareArgs,
    first: usize,
    whole_row: f32,
) void {
    const q = args.query;
    const Groups = @Vector(count, f32);
    const planes = T.query_planes;
    const words = q.dim / 4;
    const row_planes = q.planes + args.row * 2 * words;
    const limit: Groups = @splat(if (planes == 1) 127 else 63 * 128 + 63);
    var parts: [count][2]F = undefined;
    var maxima: [count]F = undefined;
    inline for (&parts, &maxima, 0..) |*part, *maximum, i| {
        const at = q.values + args.row * q.dim + (first + i) * format.group;
        part.* = .{ vec.load(F, at), vec.load(F, at + vec.lanes) };
        maximum.* = vec.max(@abs(part[0]), @abs(part[1]));
    }
    const top: Groups = if (planes == 2)
        @splat(whole_row)
    else
        vec.fold_each(.max, F, count, &maxima);
    // The reciprocal of a subnormal would be infinite; such a query is zero beside any key.
    const worth = top > @as(Groups, @splat(1e-30));
    const inverses: [count]f32 = @select(f32, worth, limit / top, @as(Groups, @splat(0)));
    const of_first = args.row * q.groups() + first;
    q.scales[of_first..][0..count].* = top / limit;
    var sums: [count]I = undefined;
    inline for (&sums, parts, inverses, 0..) |*sum, part, inverse, i| {
        sum.* = @splat(0);
        inline for (part, 0..) |x, half| {
            const integers = vec.round_to_int(x * vec.splat(inverse));
            sum.* +%= integers;
            const low = if (planes == 1) integers else low_plane(integers);
            const at = (first + i) * format.group / 4 + half * vec.lanes / 4;
            vec.store(row_planes + (planes - 1) * words + at, @as(@Vector(16, i8), @truncate(low)));
            if (planes == 2) vec.store(row_planes + at, high_plane(integers, low));
        }
    }
    q.sums[of_first..][0..count].* = vec.fold_each(.add, I, count, &sums);
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
