//! Narrows integers to bytes and puts the bytes in order, by the best instructions of each ISA;
//! every branch returns the same bits. Used by encode.zig.
const std = @import("std");
const vec = @import("vec.zig");
const has = vec.has;
const lanes = vec.lanes;
const I = vec.I;

/// Four bytes for each of 16 lanes.
pub const Bytes = @Vector(64, u8);

/// Integers of 16 bits become bytes, saturated: in each quarter of the result four bytes of a,
/// then of b, c and d.
pub inline fn to_bytes(vectors: *const [4]I) @Vector(64, i8) {
    if (!has.llvm) return to_bytes_portable(vectors);
    @setEvalBranchQuota(10_000);
    const n = if (has.avx512) 16 else if (has.avx2) 8 else 4;
    var parts: [16 / n]@Vector(4 * n, i8) = undefined;
    inline for (&parts, 0..) |*result, i| {
        var v: [4]@Vector(n, i32) = undefined;
        inline for (&v, vectors) |*x, whole| x.* = std.simd.extract(whole, i * n, n);
        result.* = if (has.avx512) x86.@"llvm.x86.avx512.packsswb.512"(
            x86.@"llvm.x86.avx512.packssdw.512"(v[0], v[1]),
            x86.@"llvm.x86.avx512.packssdw.512"(v[2], v[3]),
        ) else if (has.avx2) x86.@"llvm.x86.avx2.packsswb"(
            x86.@"llvm.x86.avx2.packssdw"(v[0], v[1]),
            x86.@"llvm.x86.avx2.packssdw"(v[2], v[3]),
        ) else if (has.ssse3) x86.@"llvm.x86.sse2.packsswb.128"(
            x86.@"llvm.x86.sse2.packssdw.128"(v[0], v[1]),
            x86.@"llvm.x86.sse2.packssdw.128"(v[2], v[3]),
        ) else if (has.simd128) wasm.@"llvm.wasm.narrow.signed.v16i8.v8i16"(
            wasm.@"llvm.wasm.narrow.signed.v8i16.v4i32"(v[0], v[1]),
            wasm.@"llvm.wasm.narrow.signed.v8i16.v4i32"(v[2], v[3]),
        ) else if (has.arm) std.simd.join(
            arm.@"llvm.aarch64.neon.sqxtn.v8i8"(halves_of(v[0], v[1])),
            arm.@"llvm.aarch64.neon.sqxtn.v8i8"(halves_of(v[2], v[3])),
        ) else return to_bytes_portable(vectors);
    }
    return @bitCast(parts);
}

fn halves_of(a: @Vector(4, i32), b: @Vector(4, i32)) @Vector(8, i16) {
    const both: @Vector(16, i16) = @bitCast(std.simd.join(a, b));
    return @shuffle(i16, both, undefined, std.simd.iota(i32, 8) * @as(@Vector(8, i32), @splat(2)));
}

fn to_bytes_portable(vectors: *const [4]I) @Vector(64, i8) {
    var bytes: [4][4][4]i8 = undefined; // quarter, vector, lane
    inline for (vectors, 0..) |v, which| {
        const least, const most = .{ @as(I, @splat(-128)), @as(I, @splat(127)) };
        const saturated: [lanes]i8 = @as(@Vector(lanes, i8), @truncate(@min(@max(v, least), most)));
        for (0..4) |q| bytes[q][which] = saturated[4 * q ..][0..4].*;
    }
    return @bitCast(bytes);
}

/// Transposes the 4 x 4 bytes of each quarter.
pub inline fn transpose_quarters(bytes: Bytes) Bytes {
    const order = comptime blk: {
        @setEvalBranchQuota(10_000);
        var from: [64]i32 = undefined;
        for (&from, 0..) |*index, i| index.* = i / 16 * 16 + i % 4 * 4 + i / 4 % 4;
        break :blk from;
    };
    return @shuffle(u8, bytes, undefined, order);
}

/// Transposes the quarters of four vectors.
pub inline fn transpose_vectors(vectors: *const [4]Bytes) [4]Bytes {
    const Quarters = @Vector(16, u32);
    const even = [16]i32{ 0, 1, 2, 3, 8, 9, 10, 11, ~@as(i32, 0), -2, -3, -4, -9, -10, -11, -12 };
    const odd = [16]i32{ 4, 5, 6, 7, 12, 13, 14, 15, -5, -6, -7, -8, -13, -14, -15, -16 };
    var q: [4]Quarters = undefined;
    inline for (&q, vectors) |*to, from| to.* = @bitCast(from);
    const a = @shuffle(u32, q[0], q[1], even); // chunks 0 and 2 of tokens 0 to 7
    const b = @shuffle(u32, q[2], q[3], even);
    const c = @shuffle(u32, q[0], q[1], odd);
    const d = @shuffle(u32, q[2], q[3], odd);
    return .{
        @bitCast(@shuffle(u32, a, b, even)),
        @bitCast(@shuffle(u32, c, d, even)),
        @bitCast(@shuffle(u32, a, b, odd)),
        @bitCast(@shuffle(u32, c, d, odd)),
    };
}

const x86 = struct {
    const I8x16 = @Vector(16, i8);
    const I8x32 = @Vector(32, i8);
    const I8x64 = @Vector(64, i8);
    const I16x8 = @Vector(8, i16);
    const I16x16 = @Vector(16, i16);
    const I16x32 = @Vector(32, i16);
    const I32x4 = @Vector(4, i32);
    const I32x8 = @Vector(8, i32);
    extern fn @"llvm.x86.avx512.packssdw.512"(I, I) callconv(vec.sysv) I16x32;
    extern fn @"llvm.x86.avx512.packsswb.512"(I16x32, I16x32) callconv(vec.sysv) I8x64;
    extern fn @"llvm.x86.avx2.packssdw"(I32x8, I32x8) callconv(vec.sysv) I16x16;
    extern fn @"llvm.x86.avx2.packsswb"(I16x16, I16x16) callconv(vec.sysv) I8x32;
    extern fn @"llvm.x86.sse2.packssdw.128"(I32x4, I32x4) callconv(vec.sysv) I16x8;
    extern fn @"llvm.x86.sse2.packsswb.128"(I16x8, I16x8) callconv(vec.sysv) I8x16;
};
const arm = struct {
    extern fn @"llvm.aarch64.neon.sqxtn.v8i8"(@Vector(8, i16)) @Vector(8, i8);
};
const wasm = struct {
    extern fn @"llvm.wasm.narrow.signed.v8i16.v4i32"(
        @Vector(4, i32),
        @Vector(4, i32),
    ) @Vector(8, i16);
    extern fn @"llvm.wasm.narrow.signed.v16i8.v8i16"(
        @Vector(8, i16),
        @Vector(8, i16),
    ) @Vector(16, i8);
};

test "narrow saturates and puts bytes where it says" {
    var prng = std.Random.DefaultPrng.init(6);
    var vectors: [4]I = undefined;
    for (&vectors) |*v| {
        var array: [lanes]i32 = undefined;
        for (&array) |*x| x.* = prng.random().intRangeAtMost(i32, -300, 300);
        v.* = array;
    }
    const bytes: [64]i8 = to_bytes(&vectors);
    const transposed: [64]i8 = @bitCast(transpose_quarters(@bitCast(bytes)));
    for (vectors, 0..) |v, which| {
        const array: [lanes]i32 = v;
        for (array, 0..) |x, l| {
            const expected: i8 = @intCast(std.math.clamp(x, -128, 127));
            try std.testing.expectEqual(expected, bytes[l / 4 * 16 + which * 4 + l % 4]);
            try std.testing.expectEqual(expected, transposed[l * 4 + which]);
        }
    }
}
