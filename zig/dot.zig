//! The integer half of the vector vocabulary: products of 16-bit fixed-point numbers and the 4-way
//! int8 dot product, by the best instruction of each ISA. All results are exact, so every branch
//! returns the same bits. Used by score.zig and accumulate.zig.
const std = @import("std");
const vec = @import("vec.zig");
const has = vec.has;
const lanes = vec.lanes;
const I = vec.I;
const U = vec.U;

/// 64 bytes: four int8 codes for each of 16 lanes.
pub const Codes = @Vector(64, u8);

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

pub inline fn shift_left(a: Halves, bits: u4) Halves {
    // LLVM would shift element by element.
    if (has.simd128) return a *% @as(Halves, @splat(@as(i16, 1) << bits));
    return a << @splat(bits);
}

/// Products of fixed-point numbers of 15 bits, rounded: (a * b + 2^14) >> 15. Not both may be
/// -2^15.
pub inline fn multiply_q15(a: Halves, b: Halves) Halves {
    if (!has.llvm) return multiply_q15_portable(a, b);
    if (has.avx512) return x86.@"llvm.x86.avx512.pmul.hr.sw.512"(a, b);
    const n = if (has.avx2) 16 else 8;
    var parts: [32 / n]@Vector(n, i16) = undefined;
    inline for (&parts, 0..) |*result, i| {
        const x = std.simd.extract(a, i * n, n);
        const y = std.simd.extract(b, i * n, n);
        result.* = if (has.avx2)
            x86.@"llvm.x86.avx2.pmul.hr.sw"(x, y)
        else if (has.ssse3)
            x86.@"llvm.x86.ssse3.pmul.hr.sw.128"(x, y)
        else if (has.arm)
            arm.@"llvm.aarch64.neon.sqrdmulh.v8i16"(x, y)
        else if (has.simd128)
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
    var sum: Accumulator = .init(0);
    sum.dot_signed(@bitCast(words), 0x01010101);
    return sum.get();
}

// ---- the 4-way int8 dot product ----

/// What a code must have added before it enters `Accumulator.dot`: x86 multiplies unsigned by
/// signed.
pub const code_bias: i32 = if (has.x86) 128 else 0;

/// 64 signed codes as `Accumulator.dot` wants them.
pub inline fn load_signed_codes(source: [*]const u8) Codes {
    const codes = vec.load(Codes, source);
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
} = if (has.vnni512)
    .vnni512
else if (has.avx512)
    .maddubs512
else if (has.avx2)
    .maddubs256
else if (has.ssse3)
    .maddubs128
else if (has.dotprod)
    .sdot
else if (has.llvm and has.arm)
    .smull
else if (has.simd128)
    .wasm_dot
else
    .portable;

/// Accumulators that the registers hold beside what is being added.
pub const accumulators_max = switch (method) {
    .vnni512, .maddubs512 => 16,
    .maddubs256, .maddubs128, .sdot => 4,
    // These widen the codes first: better some sums on the stack than codes widened again.
    .wasm_dot, .smull, .portable => 8,
};

// LLVM intrinsics as extern functions.
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
    extern fn @"llvm.x86.avx512.vpdpbusd.512"(I, I, I) callconv(vec.sysv) I;
    extern fn @"llvm.x86.avx512.pmaddubs.w.512"(Codes, I8x64) callconv(vec.sysv) I16x32;
    extern fn @"llvm.x86.avx512.pmaddw.d.512"(I16x32, I16x32) callconv(vec.sysv) I;
    extern fn @"llvm.x86.avx2.pmadd.ub.sw"(U8x32, I8x32) callconv(vec.sysv) I16x16;
    extern fn @"llvm.x86.avx2.pmadd.wd"(I16x16, I16x16) callconv(vec.sysv) I32x8;
    extern fn @"llvm.x86.ssse3.pmadd.ub.sw.128"(U8x16, I8x16) callconv(vec.sysv) I16x8;
    extern fn @"llvm.x86.sse2.pmadd.wd"(I16x8, I16x8) callconv(vec.sysv) I32x4;
    extern fn @"llvm.x86.avx512.pmul.hr.sw.512"(I16x32, I16x32) callconv(vec.sysv) I16x32;
    extern fn @"llvm.x86.avx2.pmul.hr.sw"(I16x16, I16x16) callconv(vec.sysv) I16x16;
    extern fn @"llvm.x86.ssse3.pmul.hr.sw.128"(I16x8, I16x8) callconv(vec.sysv) I16x8;
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
/// `load_signed_codes` gives them with words of bytes in [-64, 64], or codes below 64 with any;
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
    // wasm: bytes of even and of odd index are 16-bit numbers by a shift or two.
    .wasm_dot => struct {
        sum: [4]@Vector(4, i32),

        const V = @Vector(8, i16);
        const byte: @Vector(8, u4) = @splat(8);

        pub inline fn init(x: i32) @This() {
            return .{ .sum = @splat(@splat(x)) };
        }
        pub inline fn dot(a: *@This(), codes: Codes, word: i32) void {
            const words: V = @bitCast(@as(@Vector(4, i32), @splat(word)));
            const even_words, const odd_words = .{ (words << byte) >> byte, words >> byte };
            inline for (0..4) |k| {
                const quarter: V = @bitCast(part(16, codes, k));
                const even, const odd = .{ (quarter << byte) >> byte, quarter >> byte };
                a.sum[k] +%= wasm.@"llvm.wasm.dot"(even, even_words);
                a.sum[k] +%= wasm.@"llvm.wasm.dot"(odd, odd_words);
            }
        }
        pub const dot_signed = dot;
        pub inline fn get(a: @This()) I {
            return std.simd.join(
                std.simd.join(a.sum[0], a.sum[1]),
                std.simd.join(a.sum[2], a.sum[3]),
            );
        }
    },
    // NEON without dotprod: each lane's sum is kept in two halves until `get`.
    .smull => struct {
        sum: [8]@Vector(4, i32),

        pub inline fn init(x: i32) @This() {
            return .{ .sum = @splat(.{ x, 0, x, 0 }) };
        }
        pub inline fn dot(a: *@This(), codes: Codes, word: i32) void {
            const words: @Vector(8, i8) = @bitCast(@as(@Vector(2, i32), @splat(word)));
            inline for (0..8) |k| {
                const eighth: @Vector(8, i8) = @bitCast(part(8, codes, k));
                a.sum[k] +%= arm.@"llvm.aarch64.neon.saddlp.v4i32.v8i16"(
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
