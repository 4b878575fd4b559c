//! The vector vocabulary: logical vectors of 16 lanes, and the few operations whose best
//! instruction depends on the ISA. This is the only file that knows an instruction set by name;
//! every branch of it returns the same bits. Used by all kernels.
const std = @import("std");
const builtin = @import("builtin");

pub const lanes = 16;
pub const F = @Vector(lanes, f32);
pub const I = @Vector(lanes, i32);
pub const U = @Vector(lanes, u32);
/// 64 bytes: four int8 codes for each of 16 lanes.
pub const Codes = @Vector(64, u8);

const cpu = builtin.cpu;
const llvm = builtin.zig_backend == .stage2_llvm;
const is_x86 = cpu.arch == .x86_64;
const is_arm = cpu.arch == .aarch64;
const is_wasm = cpu.arch.isWasm();
const has_vnni512 = llvm and is_x86 and cpu.hasAll(.x86, &.{ .avx512vnni, .avx512bw });
const has_avx512 = llvm and is_x86 and cpu.has(.x86, .avx512bw);
const has_avx2 = llvm and is_x86 and cpu.has(.x86, .avx2);
const has_ssse3 = llvm and is_x86 and cpu.has(.x86, .ssse3);
const has_dotprod = llvm and is_arm and cpu.has(.aarch64, .dotprod);
const has_simd128 = llvm and is_wasm and cpu.has(.wasm, .simd128);
const has_f16_conversion = (is_x86 and cpu.has(.x86, .f16c)) or is_arm;

/// 32 vector registers of 64 bytes: kernels keep more accumulators in flight.
pub const wide_registers = has_avx512;

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

/// f16 to f32, exact. NaN payloads do not occur in pages.
pub inline fn from_f16(comptime n: usize, half: @Vector(n, f16)) @Vector(n, f32) {
    if (has_f16_conversion) return @floatCast(half);
    return from_f16_soft(n, half);
}

pub inline fn from_f16_soft(comptime n: usize, half: @Vector(n, f16)) @Vector(n, f32) {
    const UN = @Vector(n, u32);
    const FN = @Vector(n, f32);
    const bits: UN = @as(@Vector(n, u16), @bitCast(half));
    const sign = (bits & @as(UN, @splat(0x8000))) << @splat(16);
    // Exponent and mantissa in their f32 place, still with the f16 bias of 15.
    const shifted = (bits & @as(UN, @splat(0x7fff))) << @splat(13);
    const rebias: u32 = 112 << 23;
    const normal = shifted + @as(UN, @splat(rebias));
    // A subnormal f16: let the adder normalise it. Exact, and free of f32 subnormals.
    const one_up: UN = @splat(113 << 23);
    const subnormal: FN = @as(FN, @bitCast(shifted | one_up)) - @as(FN, @bitCast(one_up));
    const is_subnormal = shifted < @as(UN, @splat(1 << 23));
    const is_infinite = shifted >= @as(UN, @splat(31 << 23));
    var result = @select(u32, is_subnormal, @as(UN, @bitCast(subnormal)), normal);
    result = @select(u32, is_infinite, shifted + @as(UN, @splat(2 * rebias)), result);
    return @bitCast(result | sign);
}

/// f32 to f16, round to nearest even; too large becomes infinite.
pub inline fn to_f16(comptime n: usize, x: @Vector(n, f32)) @Vector(n, f16) {
    if (has_f16_conversion) return @floatCast(x);
    return to_f16_soft(n, x);
}

pub inline fn to_f16_soft(comptime n: usize, x: @Vector(n, f32)) @Vector(n, f16) {
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
    const narrow: @Vector(n, u16) = @truncate(result | sign);
    return @bitCast(narrow);
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
    return @as(I, @bitCast(x + splat(round_magic))) -% @as(I, @splat(@bitCast(round_magic)));
}

// ---- reductions, always by the same tree: (i, i+8), (i, i+4), (i, i+2), (i, i+1) ----

pub const Reduction = enum { add, max };

inline fn combine(comptime op: Reduction, a: anytype, b: @TypeOf(a)) @TypeOf(a) {
    if (@typeInfo(@TypeOf(a)).vector.child == f32) return if (op == .max) max(a, b) else a + b;
    return if (op == .max) @max(a, b) else a +% b;
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
    const padded = comptime std.math.ceilPowerOfTwo(usize, n) catch unreachable;
    var all: [padded]V = undefined; // what pads it is not used
    @memcpy(all[0..n], vectors);
    var folded = transpose_reduce(V, padded, op, &all);
    comptime var distance = lanes / padded / 2;
    inline while (distance > 0) : (distance /= 2) {
        const partner = comptime std.simd.iota(i32, lanes) ^ @as(I, @splat(distance));
        folded = combine(op, folded, @shuffle(@typeInfo(V).vector.child, folded, undefined, partner));
    }
    const firsts = comptime std.simd.iota(i32, n) * @as(@Vector(n, i32), @splat(lanes / padded));
    return @shuffle(@typeInfo(V).vector.child, folded, undefined, firsts);
}

/// Segment s of the result, of lanes / n lanes, is what `vectors[s]` reduces to in as many lanes.
inline fn transpose_reduce(
    comptime V: type,
    comptime n: usize,
    comptime op: Reduction,
    vectors: *const [n]V,
) V {
    const T = @typeInfo(V).vector.child;
    var current: [n]V = undefined;
    inline for (0..n) |l| current[comptime bit_reversed(n, l)] = vectors[l];
    comptime var segment = lanes;
    comptime var pairs = n / 2;
    inline while (pairs > 0) : ({
        segment /= 2;
        pairs /= 2;
    }) {
        const low = comptime low_halves(segment);
        const high = comptime high_halves(segment);
        inline for (0..pairs) |i| {
            const a = current[i];
            const b = current[i + pairs];
            current[i] = combine(op, @shuffle(T, a, b, low), @shuffle(T, a, b, high));
        }
    }
    return current[0];
}

fn bit_reversed(n: usize, index: usize) usize {
    var result: usize = 0;
    var bit: usize = 1;
    while (bit < n) : (bit *= 2) {
        result *= 2;
        if (index & bit != 0) result += 1;
    }
    return result;
}

/// Shuffle mask: the lower half of every segment of a, then of b.
fn low_halves(comptime segment: usize) [lanes]i32 {
    var mask: [lanes]i32 = undefined;
    var k: usize = 0;
    for (0..2) |operand| for (0..lanes / segment) |s| for (0..segment / 2) |i| {
        const lane: i32 = @intCast(s * segment + i);
        mask[k] = if (operand == 0) lane else ~lane;
        k += 1;
    };
    return mask;
}

fn high_halves(comptime segment: usize) [lanes]i32 {
    var mask = low_halves(segment);
    const shift: i32 = segment / 2;
    for (&mask) |*lane| lane.* += if (lane.* >= 0) shift else -shift;
    return mask;
}

// ---- 16-bit fixed point ----

/// 16-bit integers, two for each of 16 lanes.
pub const Halves = @Vector(32, i16);

/// The low halves of two vectors' lanes, side by side.
pub inline fn pair_halves(a: U, b: U) Halves {
    return @bitCast((a & @as(U, @splat(0xffff))) | (b << @splat(16)));
}

/// Per half the high byte of a, then that of b.
pub inline fn high_bytes(a: Halves, b: Halves) U {
    const x, const y = .{ @as(UHalves, @bitCast(a)), @as(UHalves, @bitCast(b)) };
    return @bitCast((x >> @splat(8)) | (y & @as(UHalves, @splat(0xff00))));
}

/// Per half the low byte of a, then that of b.
pub inline fn low_bytes(a: Halves, b: Halves) U {
    const x, const y = .{ @as(UHalves, @bitCast(a)), @as(UHalves, @bitCast(b)) };
    return @bitCast((x & @as(UHalves, @splat(0xff))) | (y << @splat(8)));
}

const UHalves = @Vector(32, u16);

/// Products of fixed-point numbers of 15 bits, rounded: (a * b + 2^14) >> 15. Not both may be -2^15.
pub inline fn multiply_q15(a: Halves, b: Halves) Halves {
    if (!llvm) return multiply_q15_portable(a, b);
    if (has_avx512) return x86.@"llvm.x86.avx512.pmul.hr.sw.512"(a, b);
    const n = if (has_avx2) 16 else 8;
    var parts: [32 / n]@Vector(n, i16) = undefined;
    inline for (&parts, 0..) |*result, i| {
        const x = std.simd.extract(a, i * n, n);
        const y = std.simd.extract(b, i * n, n);
        result.* = if (has_avx2)
            x86.@"llvm.x86.avx2.pmul.hr.sw"(x, y)
        else if (has_ssse3)
            x86.@"llvm.x86.ssse3.pmul.hr.sw.128"(x, y)
        else if (is_arm)
            arm.@"llvm.aarch64.neon.sqrdmulh.v8i16"(x, y)
        else if (has_simd128)
            wasm.@"llvm.wasm.q15mulr.sat.signed"(x, y)
        else
            return multiply_q15_portable(a, b);
    }
    return @bitCast(parts);
}

fn multiply_q15_portable(a: Halves, b: Halves) Halves {
    const Wide = @Vector(32, i32);
    const product = @as(Wide, a) *% @as(Wide, b) +% @as(Wide, @splat(1 << 14));
    return @truncate(product >> @splat(15));
}

/// The sum of each lane's two halves.
pub inline fn sum_halves(halves: Halves) I {
    const both: I = @bitCast(halves);
    return (both >> @splat(16)) +% ((both << @splat(16)) >> @splat(16));
}

/// The sum of each lane's four signed bytes.
pub inline fn sum_bytes(words: U) I {
    const bytes: Codes = @bitCast(words);
    var sum: Accumulator = .init(-4 * code_bias);
    sum.dot(if (code_bias != 0) bytes ^ @as(Codes, @splat(0x80)) else bytes, 0x01010101);
    return sum.get();
}

// ---- the 4-way int8 dot product ----

/// What a code must have added before it enters `Accumulator.dot`: x86 multiplies unsigned by
/// signed.
pub const code_bias: i32 = if (is_x86) 128 else 0;

/// 64 signed codes as `Accumulator.dot` wants them.
pub inline fn load_signed_codes(source: [*]const u8) Codes {
    const codes = load(Codes, source);
    return if (code_bias != 0) codes ^ @as(Codes, @splat(0x80)) else codes;
}

pub inline fn low_nibbles(codes: Codes) Codes {
    return codes & @as(Codes, @splat(15));
}

pub inline fn high_nibbles(codes: Codes) Codes {
    return codes >> @splat(4);
}

const method: enum {
    vnni512,
    maddubs512,
    maddubs256,
    maddubs128,
    sdot,
    smull,
    wasm_dot,
    portable,
} = if (has_vnni512)
    .vnni512
else if (has_avx512)
    .maddubs512
else if (has_avx2)
    .maddubs256
else if (has_ssse3)
    .maddubs128
else if (has_dotprod)
    .sdot
else if (llvm and is_arm)
    .smull
else if (has_simd128)
    .wasm_dot
else
    .portable;

// LLVM intrinsics as extern functions. The SysV convention makes Zig pass vectors by value on
// Windows too.
const sysv: std.lang.CallingConvention = .{ .x86_64_sysv = .{} };
const x86 = struct {
    const U8x16 = @Vector(16, u8);
    const I8x16 = @Vector(16, i8);
    const U8x32 = @Vector(32, u8);
    const I8x32 = @Vector(32, i8);
    const I8x64 = @Vector(64, i8);
    const I16x8 = @Vector(8, i16);
    const I16x16 = @Vector(16, i16);
    const I16x32 = @Vector(32, i16);
    const I32x4 = @Vector(4, i32);
    const I32x8 = @Vector(8, i32);
    extern fn @"llvm.x86.avx512.vpdpbusd.512"(I, I, I) callconv(sysv) I;
    extern fn @"llvm.x86.avx512.pmaddubs.w.512"(Codes, I8x64) callconv(sysv) I16x32;
    extern fn @"llvm.x86.avx512.pmaddw.d.512"(I16x32, I16x32) callconv(sysv) I;
    extern fn @"llvm.x86.avx2.pmadd.ub.sw"(U8x32, I8x32) callconv(sysv) I16x16;
    extern fn @"llvm.x86.avx2.pmadd.wd"(I16x16, I16x16) callconv(sysv) I32x8;
    extern fn @"llvm.x86.ssse3.pmadd.ub.sw.128"(U8x16, I8x16) callconv(sysv) I16x8;
    extern fn @"llvm.x86.sse2.pmadd.wd"(I16x8, I16x8) callconv(sysv) I32x4;
    extern fn @"llvm.x86.avx512.pmul.hr.sw.512"(I16x32, I16x32) callconv(sysv) I16x32;
    extern fn @"llvm.x86.avx2.pmul.hr.sw"(I16x16, I16x16) callconv(sysv) I16x16;
    extern fn @"llvm.x86.ssse3.pmul.hr.sw.128"(I16x8, I16x8) callconv(sysv) I16x8;
};
const arm = struct {
    const I32x4 = @Vector(4, i32);
    const I8x16 = @Vector(16, i8);
    extern fn @"llvm.aarch64.neon.sdot.v4i32.v16i8"(I32x4, I8x16, I8x16) I32x4;
    extern fn @"llvm.aarch64.neon.smull.v8i16"(@Vector(8, i8), @Vector(8, i8)) @Vector(8, i16);
    extern fn @"llvm.aarch64.neon.saddlp.v4i32.v8i16"(@Vector(8, i16)) @Vector(4, i32);
    extern fn @"llvm.aarch64.neon.sqrdmulh.v8i16"(@Vector(8, i16), @Vector(8, i16)) @Vector(8, i16);
};
const wasm = struct {
    extern fn @"llvm.wasm.dot"(@Vector(8, i16), @Vector(8, i16)) @Vector(4, i32);
    extern fn @"llvm.wasm.q15mulr.sat.signed"(@Vector(8, i16), @Vector(8, i16)) @Vector(8, i16);
};

/// 16 int32 sums; each dot product adds four products to every lane. Exact integers, so the same on
/// every ISA, within the bounds beyond which pmaddubsw saturates: `dot` takes codes as
/// `load_signed_codes` gives them with words of bytes in [-64, 64], or nibbles with any;
/// `dot_signed` takes signed codes above -128 as they are, and words of bytes in [0, 127].
pub const Accumulator = switch (method) {
    .vnni512, .maddubs512, .portable => struct {
        sum: I,

        pub inline fn init(x: i32) @This() {
            return .{ .sum = @splat(x) };
        }
        pub inline fn dot(a: *@This(), codes: Codes, word: i32) void {
            switch (method) {
                .vnni512 => a.sum = x86.@"llvm.x86.avx512.vpdpbusd.512"(
                    a.sum,
                    @bitCast(codes),
                    @splat(word),
                ),
                .maddubs512 => {
                    const pairs = x86.@"llvm.x86.avx512.pmaddubs.w.512"(
                        codes,
                        @bitCast(@as(I, @splat(word))),
                    );
                    a.sum +%= x86.@"llvm.x86.avx512.pmaddw.d.512"(pairs, @splat(1));
                },
                else => a.sum +%= dot_portable(codes, code_bias == 0, word),
            }
        }
        pub inline fn dot_signed(a: *@This(), codes: Codes, word: i32) void {
            const words: I = @splat(word);
            switch (method) {
                .vnni512 => a.sum = x86.@"llvm.x86.avx512.vpdpbusd.512"(
                    a.sum,
                    words,
                    @bitCast(codes),
                ),
                .maddubs512 => {
                    const pairs = x86.@"llvm.x86.avx512.pmaddubs.w.512"(
                        @bitCast(words),
                        @bitCast(codes),
                    );
                    a.sum +%= x86.@"llvm.x86.avx512.pmaddw.d.512"(pairs, @splat(1));
                },
                else => a.sum +%= dot_portable(codes, true, word),
            }
        }
        pub inline fn get(a: @This()) I {
            return a.sum;
        }
    },
    .maddubs256 => struct {
        sum: [2]@Vector(8, i32),

        pub inline fn init(x: i32) @This() {
            return .{ .sum = @splat(@splat(x)) };
        }
        pub inline fn dot(a: *@This(), codes: Codes, word: i32) void {
            inline for (0..2) |k| {
                const pairs = x86.@"llvm.x86.avx2.pmadd.ub.sw"(
                    part(32, codes, k),
                    @bitCast(@as(@Vector(8, i32), @splat(word))),
                );
                a.sum[k] +%= x86.@"llvm.x86.avx2.pmadd.wd"(pairs, @splat(1));
            }
        }
        pub inline fn dot_signed(a: *@This(), codes: Codes, word: i32) void {
            inline for (0..2) |k| {
                const pairs = x86.@"llvm.x86.avx2.pmadd.ub.sw"(
                    @bitCast(@as(@Vector(8, i32), @splat(word))),
                    @bitCast(part(32, codes, k)),
                );
                a.sum[k] +%= x86.@"llvm.x86.avx2.pmadd.wd"(pairs, @splat(1));
            }
        }
        pub inline fn get(a: @This()) I {
            return std.simd.join(a.sum[0], a.sum[1]);
        }
    },
    .maddubs128, .sdot => struct {
        sum: [4]@Vector(4, i32),

        pub inline fn init(x: i32) @This() {
            return .{ .sum = @splat(@splat(x)) };
        }
        pub inline fn dot(a: *@This(), codes: Codes, word: i32) void {
            const words: @Vector(4, i32) = @splat(word);
            inline for (0..4) |k| {
                const quarter = part(16, codes, k);
                if (method == .sdot) {
                    a.sum[k] = arm.@"llvm.aarch64.neon.sdot.v4i32.v16i8"(
                        a.sum[k],
                        @bitCast(quarter),
                        @bitCast(words),
                    );
                } else {
                    const pairs = x86.@"llvm.x86.ssse3.pmadd.ub.sw.128"(quarter, @bitCast(words));
                    a.sum[k] +%= x86.@"llvm.x86.sse2.pmadd.wd"(pairs, @splat(1));
                }
            }
        }
        pub inline fn dot_signed(a: *@This(), codes: Codes, word: i32) void {
            if (method == .sdot) return a.dot(codes, word);
            const words: @Vector(16, u8) = @bitCast(@as(@Vector(4, i32), @splat(word)));
            inline for (0..4) |k| {
                const quarter: @Vector(16, i8) = @bitCast(part(16, codes, k));
                const pairs = x86.@"llvm.x86.ssse3.pmadd.ub.sw.128"(words, quarter);
                a.sum[k] +%= x86.@"llvm.x86.sse2.pmadd.wd"(pairs, @splat(1));
            }
        }
        pub inline fn get(a: @This()) I {
            return std.simd.join(
                std.simd.join(a.sum[0], a.sum[1]),
                std.simd.join(a.sum[2], a.sum[3]),
            );
        }
    },
    // NEON without dotprod, and wasm: each lane's sum is kept in two halves until `get`.
    .smull, .wasm_dot => struct {
        sum: [8]@Vector(4, i32),

        pub inline fn init(x: i32) @This() {
            return .{ .sum = @splat(.{ x, 0, x, 0 }) };
        }
        pub inline fn dot(a: *@This(), codes: Codes, word: i32) void {
            const words: @Vector(8, i8) = @bitCast(@as(@Vector(2, i32), @splat(word)));
            inline for (0..8) |k| {
                const eighth: @Vector(8, i8) = @bitCast(part(8, codes, k));
                a.sum[k] +%= if (method == .wasm_dot)
                    wasm.@"llvm.wasm.dot"(eighth, words)
                else
                    arm.@"llvm.aarch64.neon.saddlp.v4i32.v8i16"(
                        arm.@"llvm.aarch64.neon.smull.v8i16"(eighth, words),
                    );
            }
        }
        pub const dot_signed = dot;
        pub inline fn get(a: @This()) I {
            var quarters: [4]@Vector(4, i32) = undefined;
            inline for (0..4) |k| {
                const low = a.sum[2 * k];
                const high = a.sum[2 * k + 1];
                const even = @shuffle(i32, low, high, [4]i32{ 0, 2, ~@as(i32, 0), ~@as(i32, 2) });
                const odd = @shuffle(i32, low, high, [4]i32{ 1, 3, ~@as(i32, 1), ~@as(i32, 3) });
                quarters[k] = even +% odd;
            }
            return std.simd.join(
                std.simd.join(quarters[0], quarters[1]),
                std.simd.join(quarters[2], quarters[3]),
            );
        }
    },
};

inline fn part(comptime n: usize, codes: Codes, comptime k: usize) @Vector(n, u8) {
    return std.simd.extract(codes, k * n, n);
}

/// The definition of `dot`, for targets without any of the instructions above.
fn dot_portable(codes: Codes, comptime signed: bool, word: i32) I {
    var sum: I = @splat(0);
    inline for (0..4) |k| {
        const shift: @Vector(16, u5) = @splat(24 - 8 * k);
        const top: @Vector(16, u5) = @splat(24);
        const wide = @as(U, @bitCast(codes)) << shift;
        const code: I = if (signed) @as(I, @bitCast(wide)) >> top else @bitCast(wide >> top);
        const factor = (@as(I, @splat(word)) << shift) >> top;
        sum +%= code *% factor;
    }
    return sum;
}

test "soft f16 conversions equal the hardware's for every value" {
    for (0..1 << 16) |bits| {
        const value: f16 = @bitCast(@as(u16, @intCast(bits)));
        if (std.math.isNan(value)) continue;
        const wide: f32 = value;
        const soft = from_f16_soft(1, .{value});
        try std.testing.expectEqual(@as(u32, @bitCast(wide)), @as(u32, @bitCast(soft[0])));
    }
    var prng = std.Random.DefaultPrng.init(1);
    for (0..200_000) |_| {
        const value: f32 = @bitCast(prng.random().int(u32));
        if (std.math.isNan(value)) continue;
        const narrow: f16 = @floatCast(value);
        const soft = to_f16_soft(1, .{value});
        try std.testing.expectEqual(@as(u16, @bitCast(narrow)), @as(u16, @bitCast(soft[0])));
    }
}

test "dot equals its definition" {
    var prng = std.Random.DefaultPrng.init(2);
    for (0..200) |_| {
        var bytes: [64]u8 = undefined;
        prng.random().bytes(&bytes);
        var word: [4]i8 = undefined;
        for (&word) |*w| w.* = prng.random().intRangeAtMost(i8, -64, 64);
        var accumulator = Accumulator.init(5);
        accumulator.dot(bytes, @bitCast(word));
        const expected = dot_portable(bytes, code_bias == 0, @bitCast(word)) + @as(I, @splat(5));
        try std.testing.expect(@reduce(.And, accumulator.get() == expected));

        for (&bytes) |*code| code.* = @bitCast(prng.random().intRangeAtMost(i8, -127, 127));
        for (&word) |*w| w.* = prng.random().intRangeAtMost(i8, 0, 127);
        var signed = Accumulator.init(5);
        signed.dot_signed(bytes, @bitCast(word));
        const right = dot_portable(bytes, true, @bitCast(word)) + @as(I, @splat(5));
        try std.testing.expect(@reduce(.And, signed.get() == right));
    }
}

test "multiply_q15 equals its definition, sum_bytes too" {
    var prng = std.Random.DefaultPrng.init(5);
    for (0..200) |_| {
        var a: [32]i16 = undefined;
        var b: [32]i16 = undefined;
        for (&a, &b) |*x, *y| {
            x.* = prng.random().intRangeAtMost(i16, -32767, 32767);
            y.* = prng.random().int(i16);
        }
        const got = multiply_q15(a, b);
        try std.testing.expect(@reduce(.And, got == multiply_q15_portable(a, b)));
        const words: U = @bitCast(got);
        const sums: [lanes]i32 = sum_bytes(words);
        const bytes: [64]i8 = @bitCast(words);
        for (sums, 0..) |sum, l| {
            var expected: i32 = 0;
            for (bytes[4 * l ..][0..4]) |byte| expected += byte;
            try std.testing.expectEqual(expected, sum);
        }
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
