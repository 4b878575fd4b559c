//! The Hadamard rotation along a vector, in place: it spreads outliers over all values of a group,
//! so that 4-bit codes lose less (QuaRot, arXiv 2404.00456). Orthonormal and its own inverse.
//! Called by prepare.zig (queries), encode.zig (rows on their way into the store) and attend.zig
//! (outputs).
const std = @import("std");
const vec = @import("vec.zig");
const F = vec.F;

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

/// Stages of distance 1, 2, 4, ... in this order; then the norm.
fn rotate_block(x: []f32) void {
    std.debug.assert(x.len >= pair_len);
    switch (x.len) {
        inline 32, 64, 128 => |n| rotate_registers(n, x[0..n]),
        else => {
            var i: usize = 0;
            while (i < x.len) : (i += pair_len) {
                const pair = rotate_pair(.{ vec.load(F, x.ptr + i), vec.load(F, x.ptr + i + 16) });
                vec.store(x.ptr + i, pair[0]);
                vec.store(x.ptr + i + 16, pair[1]);
            }
            var distance: usize = pair_len;
            while (distance < x.len) : (distance *= 2) butterfly_rows(x, distance);
            const norm = norm_of(x.len);
            i = 0;
            while (i < x.len) : (i += vec.lanes) {
                vec.store(x.ptr + i, vec.load(F, x.ptr + i) * vec.splat(norm));
            }
        },
    }
}

fn norm_of(len: usize) f32 {
    return @floatCast(1.0 / @sqrt(@as(f64, @floatFromInt(len))));
}

fn rotate_registers(comptime n: usize, x: *[n]f32) void {
    var v: [n / vec.lanes]F = undefined;
    inline for (&v, 0..) |*part, i| part.* = vec.load(F, x[i * vec.lanes ..].ptr);
    rotate_vectors(n / vec.lanes, &v);
    inline for (v, 0..) |part, i| vec.store(x[i * vec.lanes ..].ptr, part);
}

/// A block that fits the registers of the widest instruction sets.
pub inline fn rotate_vectors(comptime count: usize, v: *[count]F) void {
    @setEvalBranchQuota(10_000); // everything below is unrolled
    inline for (0..count / 2) |i| {
        v[2 * i], v[2 * i + 1] = rotate_pair(.{ v[2 * i], v[2 * i + 1] });
    }
    comptime var distance = 2;
    inline while (distance < count) : (distance *= 2) {
        inline for (0..count) |i| if (i & distance == 0) {
            const a, const b = .{ v[i], v[i + distance] };
            v[i], v[i + distance] = .{ a + b, a - b };
        };
    }
    inline for (v) |*part| part.* *= vec.splat(comptime norm_of(count * vec.lanes));
}

/// Values of two vectors.
const pair_len = 2 * vec.lanes;

/// The stages within 32 values.
inline fn rotate_pair(pair: [2]F) [2]F {
    if (!vec.has.fma) return rotate_pair_by_halves(pair);
    const a, const b = .{ rotate_vector(pair[0]), rotate_vector(pair[1]) };
    return .{ a + b, a - b };
}

/// The stages within a vector. Each adds to every lane its partner, or subtracts it from that. The
/// product with 1 or -1 is exact, so these are the sums and differences themselves; they take half
/// as many shuffles as halves do.
inline fn rotate_vector(x: F) F {
    var v = x;
    inline for ([_]usize{ 1, 2, 4, 8 }) |distance| {
        const partners = comptime std.simd.iota(i32, vec.lanes) ^ @as(vec.I, @splat(distance));
        const signs = comptime blk: {
            var signs: [vec.lanes]f32 = undefined;
            for (&signs, 0..) |*sign, lane| sign.* = if (lane & distance == 0) 1 else -1;
            break :blk signs;
        };
        v = @mulAdd(F, v, signs, @shuffle(f32, v, undefined, partners));
    }
    return v;
}

/// Each stage takes one half of the values against the other, sums to one vector, differences to
/// the other. Halves are picked by shuffles that stay within quarters of a vector or move whole
/// quarters, the cheap ones everywhere; the order is mended at the end.
inline fn rotate_pair_by_halves(pair: [2]F) [2]F {
    var a, var b = pair;
    inline for ([_]Pick{ .lanes, .lanes, .quarters, .quarters, .lanes }) |pick| {
        const x = @shuffle(f32, a, b, pick.mask(0));
        const y = @shuffle(f32, a, b, pick.mask(1));
        a, b = .{ x + y, x - y };
    }
    // Bits 1, 2 and 3 of the lanes' indices are now bits 2, 3 and 1.
    const order = comptime blk: {
        var lanes: [vec.lanes]i32 = undefined;
        for (&lanes, 0..) |*from, lane| {
            from.* = (lane & 1) | (lane & 2) << 1 | (lane & 4) << 1 | (lane & 8) >> 2;
        }
        break :blk lanes;
    };
    return .{ @shuffle(f32, a, undefined, order), @shuffle(f32, b, undefined, order) };
}

const Pick = enum {
    /// Every other lane of each quarter.
    lanes,
    /// Every other quarter.
    quarters,

    /// The even or odd ones of the first vector, then of the second.
    fn mask(comptime pick: Pick, comptime odd: i32) [vec.lanes]i32 {
        var result: [vec.lanes]i32 = undefined;
        for (&result, 0..) |*from, i| {
            const quarter, const lane = .{ i / 4, i % 4 };
            const second = (if (pick == .lanes) lane else quarter) / 2 == 1;
            const at: i32 = switch (pick) {
                .lanes => @intCast(quarter * 4 + lane % 2 * 2),
                .quarters => @intCast(quarter % 2 * 8 + lane),
            };
            const step: i32 = if (pick == .lanes) odd else 4 * odd;
            from.* = if (second) ~(at + step) else at + step;
        }
        return result;
    }
};

fn butterfly_rows(x: []f32, distance: usize) void {
    var base: usize = 0;
    while (base < x.len) : (base += 2 * distance) {
        var k = base;
        while (k < base + distance) : (k += vec.lanes) {
            const a = vec.load(F, x.ptr + k);
            const b = vec.load(F, x.ptr + k + distance);
            vec.store(x.ptr + k, a + b);
            vec.store(x.ptr + k + distance, a - b);
        }
    }
}

test "a block of 32 is the transform by its definition" {
    for (0..32) |column| {
        var x: [32]f32 = @splat(0);
        x[column] = 1;
        rotate(&x);
        for (x, 0..) |got, row| {
            const sign: f32 = if (@popCount(row & column) % 2 == 0) 1 else -1;
            try std.testing.expectEqual(sign * norm_of(32), got);
        }
    }
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
