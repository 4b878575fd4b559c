//! The exponential of the softmax, by operations that every target rounds alike. Called by
//! softmax.zig and state.zig.
const std = @import("std");
const vec = @import("vec.zig");

/// Minimax in relative error on [-0.5, 0.5], the first one fixed.
const coefficients = [6]f32{
    1.0,                 0.6931470036506653,   0.24022242426872253,
    0.05550733581185341, 0.009671512991189957, 0.0013264728477224708,
};

/// Vectors whose exponentials are best computed together: as many as the registers hold.
pub const together = if (vec.wide_registers) 4 else 1;

/// 2^x for x <= 0: a polynomial of degree 5 on [-0.5, 0.5], relative error below 2e-7. Exactly 1
/// at 0 and exactly 0 below -80.
pub inline fn exp2(comptime n: usize, x: @Vector(n, f32)) @Vector(n, f32) {
    return exp2_each(n, 1, &.{x})[0];
}

/// The same of several vectors, step by step: each step waits for the one before, so a processor
/// that looks ahead by few instructions must find other ones between them.
pub inline fn exp2_each(
    comptime n: usize,
    comptime count: usize,
    x: *const [count]@Vector(n, f32),
) [count]@Vector(n, f32) {
    const FN = @Vector(n, f32);
    const IN = @Vector(n, i32);
    const magic: FN = @splat(vec.round_magic);
    var shifted: [count]FN = undefined;
    inline for (&shifted, x) |*s, v| s.* = v + magic;
    var fraction: [count]FN = undefined;
    inline for (&fraction, shifted) |*f, s| f.* = s - magic;
    inline for (&fraction, x) |*f, v| f.* = v - f.*;
    var p: [count]FN = @splat(@splat(coefficients[5]));
    inline for (0..5) |k| {
        inline for (&p, fraction) |*y, f| y.* = y.* * f;
        inline for (&p) |*y| y.* = y.* + @as(FN, @splat(coefficients[4 - k]));
    }
    inline for (&p, shifted, x) |*y, s, v| {
        const exponent = @as(IN, @bitCast(s)) << @splat(23);
        // Chosen among integers, which takes no instruction of its own where additions have masks.
        const result = @as(IN, @bitCast(y.*)) +% exponent;
        y.* = @bitCast(@select(i32, v < @as(FN, @splat(-80.0)), @as(IN, @splat(0)), result));
    }
    return p;
}

test "exp2 is exact at 0, zero far below, and close elsewhere" {
    try std.testing.expectEqual(@as(f32, 1), exp2(1, .{0})[0]);
    try std.testing.expectEqual(@as(f32, 0), exp2(1, .{-1e30})[0]);
    var x: f32 = 0;
    while (x > -79) : (x -= 0.37) {
        const expected = std.math.pow(f64, 2, x);
        try std.testing.expectApproxEqRel(expected, @as(f64, exp2(1, .{x})[0]), 2e-7);
    }
}
