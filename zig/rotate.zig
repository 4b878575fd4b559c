//! The Hadamard rotation along a vector, in place: it spreads outliers over all values of a group,
//! so that 4-bit codes lose less (QuaRot, arXiv 2404.00456). Orthonormal and its own inverse.
//! Called by prepare.zig (queries), encode.zig (rows on their way into the store) and attend.zig
//! (outputs).
const std = @import("std");
const vec = @import("vec.zig");

/// `row.len` is a multiple of 32. It is cut into blocks whose sizes are powers of two, largest
/// first.
pub fn rotate(row: []f32) void {
    var rest = row;
    while (rest.len > 0) {
        const n = std.math.floorPowerOfTwo(usize, rest.len);
        rotate_block(rest[0..n]);
        rest = rest[n..];
    }
}

/// The largest block that `rotate` uses for vectors of `len` values.
pub fn largest_block(len: usize) usize {
    return std.math.floorPowerOfTwo(usize, len);
}

fn rotate_block(x: []f32) void {
    std.debug.assert(x.len >= 32);
    // Pairs at distances 1, 2, 4 and 8 lie within a vector of 16 lanes.
    var i: usize = 0;
    while (i < x.len) : (i += vec.lanes) {
        var v = vec.load(vec.F, x.ptr + i);
        inline for (.{ 1, 2, 4, 8 }) |distance| v = butterfly_within(v, distance);
        vec.store(x.ptr + i, v);
    }
    var distance: usize = vec.lanes;
    while (distance < x.len) : (distance *= 2) {
        var base: usize = 0;
        while (base < x.len) : (base += 2 * distance) {
            var k = base;
            while (k < base + distance) : (k += vec.lanes) {
                const a = vec.load(vec.F, x.ptr + k);
                const b = vec.load(vec.F, x.ptr + k + distance);
                vec.store(x.ptr + k, a + b);
                vec.store(x.ptr + k + distance, a - b);
            }
        }
    }
    const norm: f32 = @floatCast(1.0 / @sqrt(@as(f64, @floatFromInt(x.len))));
    i = 0;
    while (i < x.len) : (i += vec.lanes) vec.store(
        x.ptr + i,
        vec.load(vec.F, x.ptr + i) * vec.splat(norm),
    );
}

/// (a, b) at lanes i and i + distance become (a + b, a - b).
inline fn butterfly_within(v: vec.F, comptime distance: usize) vec.F {
    const masks = comptime blk: {
        var first: [vec.lanes]i32 = undefined;
        var second: [vec.lanes]i32 = undefined;
        var sign: [vec.lanes]f32 = undefined;
        for (0..vec.lanes) |lane| {
            first[lane] = @intCast(lane & ~distance);
            second[lane] = @intCast(lane | distance);
            sign[lane] = if (lane & distance == 0) 1 else -1;
        }
        break :blk .{ .first = first, .second = second, .sign = sign };
    };
    const a = @shuffle(f32, v, undefined, masks.first);
    const b = @shuffle(f32, v, undefined, masks.second);
    // a + b * (+-1) is a + b or a - b exactly.
    return a + b * @as(vec.F, masks.sign);
}

test "rotation is its own inverse and keeps the norm" {
    var prng = std.Random.DefaultPrng.init(7);
    for ([_]usize{ 32, 64, 96, 128, 160, 256 }) |n| {
        var x: [256]f32 = undefined;
        var y: [256]f32 = undefined;
        var norm: f64 = 0;
        for (0..n) |i| {
            x[i] = prng.random().floatNorm(f32);
            y[i] = x[i];
            norm += x[i] * x[i];
        }
        rotate(y[0..n]);
        var rotated_norm: f64 = 0;
        for (y[0..n]) |v| rotated_norm += v * v;
        try std.testing.expectApproxEqRel(norm, rotated_norm, 1e-5);
        rotate(y[0..n]);
        for (x[0..n], y[0..n]) |a, b| try std.testing.expectApproxEqAbs(a, b, 1e-5);
    }
}
