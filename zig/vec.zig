//! The vector vocabulary: logical vectors of 16 lanes and what floating point needs. With dot.zig
//! and narrow.zig, its integer half, the only file that knows an instruction set by name; every
//! branch of them returns the same bits. Used by all kernels.
const std = @import("std");
const builtin = @import("builtin");

pub const lanes = 16;
pub const F = @Vector(lanes, f32);
pub const I = @Vector(lanes, i32);
pub const U = @Vector(lanes, u32);

/// What the kernels are compiled for. Intrinsics need LLVM.
pub const has = struct {
    const cpu = builtin.cpu;
    pub const llvm = builtin.zig_backend == .stage2_llvm;
    pub const x86 = cpu.arch == .x86_64;
    pub const arm = cpu.arch == .aarch64;
    pub const vnni512 = llvm and x86 and cpu.hasAll(.x86, &.{ .avx512vnni, .avx512bw });
    pub const avx512 = llvm and x86 and cpu.hasAll(.x86, &.{ .avx512bw, .avx512dq });
    pub const avx2 = llvm and x86 and cpu.has(.x86, .avx2);
    /// Fused multiply-add. Results never depend on it.
    pub const fma = llvm and x86 and cpu.has(.x86, .fma);
    pub const ssse3 = llvm and x86 and cpu.has(.x86, .ssse3);
    pub const dotprod = llvm and arm and cpu.has(.aarch64, .dotprod);
    pub const simd128 = llvm and cpu.arch.isWasm() and cpu.has(.wasm, .simd128);
    pub const f16_conversion = (x86 and cpu.has(.x86, .f16c)) or arm;
};

/// 32 vector registers of 64 bytes: kernels keep more sums in flight.
pub const wide_registers = has.avx512;
/// Vectors of sums that the registers hold beside what is being added.
pub const sums_max = if (has.avx512) 16 else if (has.avx2 or has.arm) 4 else 2;

pub fn load(comptime V: type, source: anytype) V {
    const bytes: [*]const u8 = @ptrCast(source);
    const vector: *align(1) const V = @ptrCast(bytes);
    return vector.*;
}

pub fn store(target: anytype, vector: anytype) void {
    const bytes: [*]u8 = @ptrCast(target);
    const place: *align(1) @TypeOf(vector) = @ptrCast(bytes);
    place.* = vector;
}

pub fn splat(x: f32) F {
    return @splat(x);
}

// ---- f16 and bf16 ----

// Both as their bits: where no vector holds f16, LLVM takes each element of one on its own.

/// f16 to f32, exact. NaN payloads do not occur in pages.
pub inline fn from_f16(comptime n: usize, half: @Vector(n, u16)) @Vector(n, f32) {
    if (has.f16_conversion) return @floatCast(@as(@Vector(n, f16), @bitCast(half)));
    return from_f16_soft(n, half);
}

inline fn from_f16_soft(comptime n: usize, half: @Vector(n, u16)) @Vector(n, f32) {
    const UN = @Vector(n, u32);
    const FN = @Vector(n, f32);
    const bits: UN = half;
    const sign = (bits & @as(UN, @splat(0x8000))) << @splat(16);
    // Exponent and mantissa in their f32 place, still with the f16 bias of 15.
    const shifted = (bits & @as(UN, @splat(0x7fff))) << @splat(13);
    const rebias: UN = @splat(112 << 23);
    const normal: FN = @bitCast(shifted + rebias);
    // A subnormal f16 has no leading one: the adder takes it off and normalises. Exact, and free of
    // f32 subnormals. Of a normal one that would be the larger number.
    const one_up: UN = @splat(113 << 23);
    const subnormal = @as(FN, @bitCast(shifted + one_up)) - @as(FN, @bitCast(one_up));
    const finite: UN = @bitCast(min(normal, subnormal));
    const is_infinite = shifted >= @as(UN, @splat(31 << 23));
    const more = @select(u32, is_infinite, rebias, @as(UN, @splat(0)));
    return @bitCast(finite + more | sign);
}

/// f32 to f16, round to nearest even; too large becomes infinite.
pub inline fn to_f16(comptime n: usize, x: @Vector(n, f32)) @Vector(n, u16) {
    if (has.f16_conversion) return @bitCast(@as(@Vector(n, f16), @floatCast(x)));
    return to_f16_soft(n, x);
}

inline fn to_f16_soft(comptime n: usize, x: @Vector(n, f32)) @Vector(n, u16) {
    const UN = @Vector(n, u32);
    const FN = @Vector(n, f32);
    const bits: UN = @bitCast(x);
    const sign = (bits >> @splat(16)) & @as(UN, @splat(0x8000));
    const magnitude = bits & @as(UN, @splat(0x7fffffff));
    const odd = (magnitude >> @splat(13)) & @as(UN, @splat(1));
    const rounded = magnitude +% @as(UN, @splat(0xfff)) +% odd;
    const normal = (rounded -% @as(UN, @splat(112 << 23))) >> @splat(13);
    // A subnormal result: adding 0.5 makes the f32 adder round at bit 2^-24.
    const half: FN = @splat(0.5);
    const subnormal = @as(
        UN,
        @bitCast(@as(FN, @bitCast(magnitude)) + half),
    ) -% @as(UN, @bitCast(half));
    var result = @select(u32, magnitude < @as(UN, @splat(113 << 23)), subnormal, normal);
    result = @select(
        u32,
        magnitude >= @as(UN, @splat(0x4780_0000)),
        @as(UN, @splat(0x7c00)),
        result,
    );
    return @truncate(result | sign);
}

pub inline fn from_bf16(comptime n: usize, bits: @Vector(n, u16)) @Vector(n, f32) {
    const wide: @Vector(n, u32) = bits;
    return @bitCast(wide << @splat(16));
}

/// f32 to bf16, round to nearest even. The caller has excluded NaN.
pub inline fn to_bf16(comptime n: usize, x: @Vector(n, f32)) @Vector(n, u16) {
    const UN = @Vector(n, u32);
    const bits: UN = @bitCast(x);
    const odd = (bits >> @splat(16)) & @as(UN, @splat(1));
    return @truncate((bits +% @as(UN, @splat(0x7fff)) +% odd) >> @splat(16));
}

// ---- elementwise ----

/// Larger of two numbers, without the NaN rules of `@max` (one instruction instead of three on
/// x86).
pub inline fn max(a: anytype, b: @TypeOf(a)) @TypeOf(a) {
    return @select(f32, a > b, a, b);
}

pub inline fn min(a: anytype, b: @TypeOf(a)) @TypeOf(a) {
    return @select(f32, a < b, a, b);
}

/// `a` less the product of `b` and `c`, which is exact, so that fusing them changes nothing.
pub inline fn minus_exact(a: F, b: F, c: F) F {
    return if (has.fma) @mulAdd(F, -b, c, a) else a - b * c;
}

/// Which of the lanes `base`, `base` + 1, ... are in [first, end).
pub inline fn lanes_within(base: usize, first: usize, end: usize) @Vector(lanes, bool) {
    const index = std.simd.iota(i32, lanes) + @as(I, @splat(@intCast(base)));
    const from = index >= @as(I, @splat(@intCast(first)));
    return @select(bool, from, index < @as(I, @splat(@intCast(end))), from);
}

/// 1.5 * 2^23: adding it rounds |x| < 2^22 to the nearest even integer, held in the low bits.
pub const round_magic: f32 = 12582912.0;

/// Nearest even integer of |x| < 2^22.
pub inline fn round_to_int(x: F) I {
    if (has.avx512) {
        return intrinsics.@"llvm.x86.avx512.mask.cvtps2dq.512"(x, undefined, all_lanes, as_set);
    }
    if (has.avx2) {
        var halves: [2]@Vector(8, i32) = undefined;
        inline for (&halves, 0..) |*half, i| {
            half.* = intrinsics.@"llvm.x86.avx.cvt.ps2dq.256"(std.simd.extract(x, 8 * i, 8));
        }
        return @bitCast(halves);
    }
    return @as(I, @bitCast(x + splat(round_magic))) -% @as(I, @splat(@bitCast(round_magic)));
}

/// x * numbers[index]. AVX-512 can broadcast a number on its way to the multiplier, but LLVM shares
/// one instruction for that among products of the same number, which on Zen 4 takes the time of
/// an addition.
pub inline fn times(x: F, numbers: [*]const f32, index: usize) F {
    if (has.avx512) return asm ("vmulps (%[numbers],%[index],4){1to16}, %[x], %[product]"
        : [product] "=v" (-> F),
        : [numbers] "r" (numbers),
          [index] "r" (index),
          [x] "v" (x),
        : .{ .memory = true });
    return x * splat(numbers[index]);
}

/// Whether numbers are best loaded and converted a step before they are used. A processor that
/// looks ahead by few instructions (Zen 4: 64 that wait for operands) else stops for each.
pub const converts_early = has.avx512;

/// x, computed where this stands, which LLVM would otherwise do where it is used.
pub inline fn early(x: F) F {
    if (!converts_early) return x;
    return asm (""
        : [same] "=v" (-> F),
        : [x] "0" (x),
    );
}

// ---- which value is outermost ----

/// A value, in a form in which outer ones are quickly found.
pub const Rank = if (has.avx512) F else U;

pub inline fn rank(x: F) Rank {
    if (has.avx512) return x;
    // Integers in the order of magnitudes; the lowest bit is set for positive values.
    const word: U = @bitCast(x);
    return (word << @splat(1) | word >> @splat(31)) ^ @as(U, @splat(1));
}

/// The one of larger magnitude; of equal magnitudes the positive one.
pub inline fn outer(a: Rank, b: Rank) Rank {
    if (!has.avx512) return @max(a, b);
    const magnitude_max_signed = 0b0111;
    return intrinsics.@"llvm.x86.avx512.mask.range.ps.512"(
        a,
        b,
        magnitude_max_signed,
        a,
        all_lanes,
        as_set,
    );
}

pub inline fn unrank(ranks: Rank) F {
    if (has.avx512) return ranks;
    const sign = (ranks ^ @as(U, @splat(1))) << @splat(31);
    return @bitCast(ranks >> @splat(1) | sign);
}

// ---- reductions, always by the same tree: (i, i+8), (i, i+4), (i, i+2), (i, i+1) ----

pub const Reduction = enum { add, max, join, outer };

inline fn combine(comptime op: Reduction, a: anytype, b: @TypeOf(a)) @TypeOf(a) {
    if (op == .outer) return outer(a, b);
    if (@typeInfo(@TypeOf(a)).vector.child == f32) return if (op == .max) max(a, b) else a + b;
    return switch (op) {
        .add => a +% b,
        .max => @max(a, b),
        .join => a | b,
        .outer => comptime unreachable,
    };
}

inline fn halve(comptime op: Reduction, v: anytype) @Vector(
    @typeInfo(@TypeOf(v)).vector.len / 2,
    f32,
) {
    const n = @typeInfo(@TypeOf(v)).vector.len / 2;
    const low: [n]i32 = std.simd.iota(i32, n);
    const high: [n]i32 = std.simd.iota(i32, n) + @as(@Vector(n, i32), @splat(n));
    return combine(op, @shuffle(f32, v, undefined, low), @shuffle(f32, v, undefined, high));
}

pub inline fn reduce(comptime op: Reduction, v: F) f32 {
    const two = halve(op, halve(op, halve(op, v)));
    return halve(op, two)[0];
}

/// The reduction of each of up to 16 vectors, by the tree of `reduce`, whatever their number.
pub inline fn fold_each(
    comptime op: Reduction,
    comptime V: type,
    comptime n: usize,
    vectors: *const [n]V,
) @Vector(n, @typeInfo(V).vector.child) {
    const T = @typeInfo(V).vector.child;
    const padded = comptime std.math.ceilPowerOfTwo(usize, n) catch unreachable;
    var all: [padded]V = undefined; // what pads it is not used
    @memcpy(all[0..n], vectors);
    var folded = transpose_reduce(V, padded, op, &all);
    comptime var distance = lanes / padded / 2;
    inline while (distance > 0) : (distance /= 2) {
        const partner = comptime std.simd.iota(i32, lanes) ^ @as(I, @splat(distance));
        folded = combine(op, folded, @shuffle(T, folded, undefined, partner));
    }
    const firsts = comptime std.simd.iota(i32, n) * @as(@Vector(n, i32), @splat(lanes / padded));
    return @shuffle(T, folded, undefined, firsts);
}

/// Segment s of the result, of lanes / n lanes, is what `vectors[s]` reduces to in as many lanes.
inline fn transpose_reduce(
    comptime V: type,
    comptime n: usize,
    comptime op: Reduction,
    vectors: *const [n]V,
) V {
    const T = @typeInfo(V).vector.child;
    var current = vectors.*;
    comptime var half = lanes / 2;
    comptime var pairs = n / 2;
    inline while (pairs > 0) : ({
        half /= 2;
        pairs /= 2;
    }) {
        const same, const other = comptime .{ same_halves(half), other_halves(half) };
        inline for (0..pairs) |i| {
            const a = current[i];
            const b = current[i + pairs];
            current[i] = combine(op, @shuffle(T, a, b, same), @shuffle(T, a, b, other));
        }
    }
    return current[0];
}

/// Shuffle mask: the lower half of every segment of a and the upper one of b, where they are.
fn same_halves(comptime half: usize) [lanes]i32 {
    var mask: [lanes]i32 = undefined;
    for (&mask, 0..) |*from, lane| from.* = if (lane & half == 0) lane else ~@as(i32, lane);
    return mask;
}

/// The other halves, in each other's place.
fn other_halves(comptime half: usize) [lanes]i32 {
    var mask: [lanes]i32 = undefined;
    for (&mask, 0..) |*from, lane| {
        from.* = if (lane & half == 0) lane + half else ~@as(i32, lane - half);
    }
    return mask;
}

// ---- transposition ----

/// Rows become columns: within quarters of the vectors first, then quarter by quarter.
pub inline fn transpose(rows: *const [lanes]F) [lanes]F {
    var squares: [4][4]F = undefined; // (row / 4, lane of a quarter)
    inline for (&squares, 0..) |*square, j| {
        const row = rows[4 * j ..][0..4];
        const even = mix(.{ 0, 4, 1, 5 }, row[0], row[1]);
        const odd = mix(.{ 0, 4, 1, 5 }, row[2], row[3]);
        const even_high = mix(.{ 2, 6, 3, 7 }, row[0], row[1]);
        const odd_high = mix(.{ 2, 6, 3, 7 }, row[2], row[3]);
        square.* = .{
            mix(.{ 0, 1, 4, 5 }, even, odd),
            mix(.{ 2, 3, 6, 7 }, even, odd),
            mix(.{ 0, 1, 4, 5 }, even_high, odd_high),
            mix(.{ 2, 3, 6, 7 }, even_high, odd_high),
        };
    }
    var columns: [lanes]F = undefined;
    inline for (0..4) |m| inline for (0..2) |parity| {
        const low = quarters(parity, squares[0][m], squares[1][m]);
        const high = quarters(parity, squares[2][m], squares[3][m]);
        columns[4 * parity + m] = quarters(0, low, high);
        columns[4 * (parity + 2) + m] = quarters(1, low, high);
    };
    return columns;
}

/// In every quarter, four lanes of the eight that a and b have there.
inline fn mix(comptime picked: [4]usize, a: F, b: F) F {
    comptime var mask: [lanes]i32 = undefined;
    inline for (&mask, 0..) |*lane, i| {
        const within = picked[i % 4];
        const from: i32 = comptime i / 4 * 4 + within % 4;
        lane.* = if (within < 4) from else ~from;
    }
    return @shuffle(f32, a, b, mask);
}

/// The even or odd quarters of a, then those of b.
inline fn quarters(comptime parity: usize, a: F, b: F) F {
    comptime var mask: [lanes]i32 = undefined;
    inline for (&mask, 0..) |*lane, i| {
        const from: i32 = comptime (i / 4 % 2 * 2 + parity) * 4 + i % 4;
        lane.* = if (i < lanes / 2) from else ~from;
    }
    return @shuffle(f32, a, b, mask);
}

test "transpose makes rows columns" {
    @setEvalBranchQuota(10_000);
    var rows: [lanes]F = undefined;
    for (&rows, 0..) |*row, r| {
        row.* = std.simd.iota(f32, lanes) + splat(@floatFromInt(r * lanes));
    }
    const columns: [lanes][lanes]f32 = @bitCast(transpose(&rows));
    for (columns, 0..) |column, c| for (column, 0..) |x, r| {
        try std.testing.expectEqual(@as(f32, @floatFromInt(r * lanes + c)), x);
    };
}

/// Of intrinsics. The SysV convention makes Zig pass vectors by value on Windows too.
pub const sysv: std.lang.CallingConvention = .{ .x86_64_sysv = .{} };
const all_lanes = 0xffff;
/// The rounding mode that the processor is in: to nearest even.
const as_set = 4;
const intrinsics = struct {
    extern fn @"llvm.x86.avx512.mask.cvtps2dq.512"(F, I, u16, i32) callconv(sysv) I;
    extern fn @"llvm.x86.avx512.mask.range.ps.512"(F, F, i32, F, u16, i32) callconv(sysv) F;
    extern fn @"llvm.x86.avx.cvt.ps2dq.256"(@Vector(8, f32)) callconv(sysv) @Vector(8, i32);
};

test "rounding is to nearest even, and the outermost value is the positive one of two" {
    const given = [_]f32{ 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999, -7.5001 };
    const expected = [_]i32{ 0, 2, 2, 0, -2, -2, 3, -8 };
    for (given, expected) |x, whole| try std.testing.expectEqual(whole, round_to_int(splat(x))[0]);
    const pairs = [_][3]f32{
        .{ 1, -2, -2 },  .{ -1, 2, 2 },
        .{ 3, -3, 3 },   .{ -3, 3, 3 },
        .{ -4, -4, -4 }, .{ 0, -1e-40, -1e-40 },
    };
    for (pairs) |pair| {
        const found = unrank(outer(rank(splat(pair[0])), rank(splat(pair[1]))));
        try std.testing.expectEqual(splat(pair[2]), found);
    }
}

test "soft f16 conversions equal the hardware's for every value" {
    for (0..1 << 16) |bits| {
        const half: u16 = @intCast(bits);
        const value: f16 = @bitCast(half);
        if (std.math.isNan(value)) continue;
        const wide: f32 = value;
        const soft = from_f16_soft(1, .{half});
        try std.testing.expectEqual(@as(u32, @bitCast(wide)), @as(u32, @bitCast(soft[0])));
    }
    var prng = std.Random.DefaultPrng.init(1);
    for (0..200_000) |_| {
        const value: f32 = @bitCast(prng.random().int(u32));
        if (std.math.isNan(value)) continue;
        const narrow: f16 = @floatCast(value);
        const soft = to_f16_soft(1, .{value});
        try std.testing.expectEqual(@as(u16, @bitCast(narrow)), soft[0]);
    }
}

test "fold_each reduces each vector as reduce does" {
    @setEvalBranchQuota(100_000);
    var prng = std.Random.DefaultPrng.init(3);
    var vectors: [lanes]F = undefined;
    for (&vectors) |*v| {
        var array: [lanes]f32 = undefined;
        for (&array) |*x| x.* = prng.random().floatNorm(f32);
        v.* = array;
    }
    inline for (.{ 1, 2, 3, 4, 16 }) |n| {
        const sums: [n]f32 = fold_each(.add, F, n, vectors[0..n]);
        const tops: [n]f32 = fold_each(.max, F, n, vectors[0..n]);
        for (vectors[0..n], sums, tops) |v, sum, top| {
            try std.testing.expectEqual(reduce(.add, v), sum);
            try std.testing.expectEqual(reduce(.max, v), top);
        }
    }
}
