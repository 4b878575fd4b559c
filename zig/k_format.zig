//! q2k to q6k: codes of 2 to 6 bits that stand for half-integers, in groups of 32 along the
//! dimension with a byte for each scale. The scale is fitted to the rounded levels by least
//! squares. docs/format.md describes the bytes, docs/numerics.md why. Used by format.zig,
//! encode_k.zig and the kernels.
const std = @import("std");
const dot = @import("dot.zig");
const format = @import("format.zig");
const vec = @import("vec.zig");
const F = vec.F;
const I = vec.I;
const U = vec.U;
const Side = format.Side;

/// The scale byte b stands for the f32 with the bits (b << 20) + this: three bits of mantissa,
/// five of exponent. Byte 0 is the scale 0.
const scale_base: u32 = (127 - 16) << 23;

pub fn K(comptime code_bits: comptime_int) type {
    return struct {
        pub const name = std.fmt.comptimePrint("q{d}k", .{code_bits});
        pub const quantized = true;
        /// Twice the stored code minus `offset` is twice the value.
        pub const half_levels = true;
        pub const bits = code_bits;
        pub const Scale = u8;
        pub const offset = (1 << bits) - 1;
        /// Int8 planes of the query: rounding it to one adds less error than storing did.
        pub const query_planes = 1;
        /// Codes are cut into a wide plane with their low bits, and maybe a narrow one.
        pub const wide_bits = switch (bits) {
            2, 3 => 2,
            else => 4,
        };
        pub const narrow_bits = bits - wide_bits;
        /// Words of codes that one load from the wide plane brings.
        pub const chunks_per_load = 8 / wide_bits;
        /// Largest and smallest code as a level.
        const half: f32 = 1 << (bits - 1);

        /// 16 scales from `index` on.
        pub inline fn load_scales(scales: [*]const u8, index: usize) F {
            const bytes: U = vec.load(@Vector(16, u8), scales + index);
            return scale_of(bytes);
        }

        pub inline fn scale_at(scales: [*]const u8, index: usize) f32 {
            return scale_of(@splat(scales[index]))[0];
        }

        inline fn scale_of(bytes: U) F {
            return scale_of_rank(vec.lanes, bytes);
        }

        /// The highest ranks among 64 scales from `index` on: their bytes.
        pub inline fn scale_ranks(scales: [*]const u8, index: usize) U {
            const four = vec.load(U, scales + index);
            const even: dot.Halves = @bitCast(four & every_half);
            const odd: dot.Halves = @bitCast((four >> @splat(8)) & every_half);
            const pairs: U = @bitCast(@max(even, odd));
            return @max(pairs & @as(U, @splat(0xff)), pairs >> @splat(16));
        }

        const every_half: U = @splat(0x00ff00ff);

        pub inline fn scale_of_rank(comptime n: usize, bytes: @Vector(n, u32)) @Vector(n, f32) {
            const UN = @Vector(n, u32);
            const FN = @Vector(n, f32);
            const scale: FN = @bitCast((bytes << @splat(20)) +% @as(UN, @splat(scale_base)));
            return @select(f32, bytes == @as(UN, @splat(0)), @as(FN, @splat(0)), scale);
        }

        // ---- words of codes ----

        /// Stored words of a group's wide plane, and bytes of one: it has a word for each slot (of
        /// keys) or dimension (of values).
        pub fn loads_per_group(side: Side) usize {
            return words_per_group(side) / chunks_per_load;
        }

        fn words_per_group(side: Side) usize {
            return if (side == .key) format.group / 4 else @as(usize, format.block_slots);
        }

        pub fn word_bytes(side: Side) usize {
            return 4 * @as(usize, if (side == .key) format.page_tokens else format.group);
        }

        const narrow_per_word = if (narrow_bits == 0) 1 else 8 / narrow_bits;

        pub const group_bytes = format.group * format.page_tokens * bits / 8;
        const wide_group_bytes = format.group * format.page_tokens * wide_bits / 8;

        /// The codes of `chunks_per_load` words, for 16 lanes from byte `at` of every word on.
        pub const Loaded = struct {
            wide: U,
            narrow: U,

            /// The words of load `l` of a group, whose codes begin at `codes`.
            pub inline fn init(side: Side, codes: [*]const u8, l: usize, at: usize) Loaded {
                const wide = vec.load(U, codes + l * word_bytes(side) + at);
                if (narrow_bits == 0) return .{ .wide = wide, .narrow = wide };
                const word = l * chunks_per_load;
                const narrow_at = word / narrow_per_word * word_bytes(side) + at;
                const shared = vec.load(U, codes + wide_group_bytes + narrow_at);
                const shift: u5 = @intCast(word % narrow_per_word * narrow_bits);
                return .{ .wide = wide, .narrow = shared >> @splat(shift) };
            }

            /// The codes of word `which` of the load, a byte each.
            pub inline fn select(loaded: Loaded, comptime which: usize) dot.Codes {
                const low = loaded.wide >> @splat(which * wide_bits) &
                    every_byte((1 << wide_bits) - 1);
                if (narrow_bits == 0) return @bitCast(low);
                // From where they are to above the low bits.
                const from = which * narrow_bits;
                const moved = if (from <= wide_bits)
                    loaded.narrow << @splat(wide_bits - from)
                else
                    loaded.narrow >> @splat(from - wide_bits);
                const mask = every_byte(((1 << narrow_bits) - 1) << wide_bits);
                return @bitCast(low | (moved & mask));
            }
        };

        inline fn every_byte(comptime byte: u32) U {
            return @splat(byte * 0x01010101);
        }

        /// Packs all words of a group, one byte a code: (word, lane) with a lane for each slot or
        /// dimension.
        pub fn pack_group(side: Side, words: [*]const u32, codes: [*]u8) void {
            const lanes = word_bytes(side) / 4;
            const count = words_per_group(side);
            var lane: usize = 0;
            while (lane < lanes) : (lane += vec.lanes) {
                for (0..count / chunks_per_load) |l| {
                    var wide: U = @splat(0);
                    for (0..chunks_per_load) |k| {
                        const word = vec.load(U, words + (l * chunks_per_load + k) * lanes + lane);
                        const shift: u5 = @intCast(k * wide_bits);
                        wide |= (word & every_byte((1 << wide_bits) - 1)) << @splat(shift);
                    }
                    vec.store(codes + (l * lanes + lane) * 4, wide);
                }
                if (narrow_bits != 0) for (0..count / narrow_per_word) |l| {
                    var narrow: U = @splat(0);
                    for (0..narrow_per_word) |k| {
                        const word = vec.load(U, words + (l * narrow_per_word + k) * lanes + lane);
                        const high = word >> @splat(wide_bits) & every_byte((1 << narrow_bits) - 1);
                        narrow |= high << @splat(@intCast(k * narrow_bits));
                    }
                    vec.store(codes + wide_group_bytes + (l * lanes + lane) * 4, narrow);
                };
            }
        }

        // ---- single codes ----

        const Place = struct { byte: usize, shift: u3 };

        fn place(side: Side, comptime plane_bits: usize, slot: usize, dim: usize) Place {
            const d = dim % format.group;
            const word, const lane, const within = switch (side) {
                .key => .{ d / 4, slot, d % 4 },
                .value => .{ slot % format.block_slots, d, slot / format.block_slots },
            };
            const per_word = 8 / plane_bits;
            return .{
                .byte = dim / format.group * group_bytes + word / per_word * word_bytes(side) +
                    lane * 4 + within,
                .shift = @intCast(word % per_word * plane_bits),
            };
        }

        pub fn get(side: Side, codes: [*]const u8, slot: usize, dim: usize) u8 {
            const wide = place(side, wide_bits, slot, dim);
            const low = codes[wide.byte] >> wide.shift & ((1 << wide_bits) - 1);
            if (narrow_bits == 0) return low;
            const narrow = place(side, narrow_bits, slot, dim);
            const high = codes[wide_group_bytes + narrow.byte] >> narrow.shift &
                ((1 << narrow_bits) - 1);
            return low | high << wide_bits;
        }

        pub fn set(side: Side, codes: [*]u8, slot: usize, dim: usize, code: u8) void {
            const wide = place(side, wide_bits, slot, dim);
            put(&codes[wide.byte], wide.shift, wide_bits, code & ((1 << wide_bits) - 1));
            if (narrow_bits == 0) return;
            const narrow = place(side, narrow_bits, slot, dim);
            const byte = &codes[wide_group_bytes + narrow.byte];
            put(byte, narrow.shift, narrow_bits, code >> wide_bits);
        }

        fn put(byte: *u8, shift: u3, comptime plane_bits: u8, code: u8) void {
            const mask = @as(u8, (1 << plane_bits) - 1) << shift;
            byte.* = (byte.* & ~mask) | code << shift;
        }

        /// The code as a number.
        pub fn value(code: u8) f32 {
            return @as(f32, @floatFromInt(code)) - @as(f32, offset) / 2;
        }

        // ---- fitting ----

        /// Values below this are nearer to zero than to the levels of the least scale.
        const least: f32 = 0x1p-17;

        /// Inverses of the scales of 16 groups whose outermost levels reach their largest
        /// magnitudes.
        pub inline fn first_inverse(largest: F) F {
            const step = largest / vec.splat(half - 0.5);
            return @select(f32, largest >= vec.splat(least), vec.splat(1) / step, vec.splat(0));
        }

        /// Levels of 16 values: half-integers.
        pub inline fn levels(x: F, inverse: F) F {
            return @as(F, @bitCast(nearest(x, inverse))) - vec.splat(vec.round_magic) +
                vec.splat(0.5);
        }

        /// The nearest levels, less one half, over `vec.round_magic`. There floats are in the order
        /// of their bits, so they are cut off as integers, which takes half the time.
        inline fn nearest(x: F, inverse: F) I {
            const shifted = x * inverse - vec.splat(0.5);
            const rounded: I = @bitCast(shifted + vec.splat(vec.round_magic));
            const lowest: I = @splat(@bitCast(vec.round_magic - half));
            const highest: I = @splat(@bitCast(vec.round_magic + half - 1));
            return @min(@max(rounded, lowest), highest);
        }

        /// The two scale bytes around fitted scales.
        pub inline fn bytes_around(fitted: F) [2]U {
            const bits_of: I = @bitCast(fitted);
            const one: I = @splat(1);
            const last: I = @splat(254);
            const below = (bits_of -% @as(I, @splat(@intCast(scale_base)))) >> @splat(20);
            const raised = @select(i32, below > one, below, one);
            const clamped: U = @bitCast(@select(i32, raised < last, raised, last));
            return .{ clamped, clamped +% @as(U, @splat(1)) };
        }

        /// The bytes of the smaller errors, and the inverses of their scales.
        pub inline fn choose(largest: F, bytes: [2]U, errors: [2]F) struct { U, F } {
            const nearer = @select(u32, errors[1] < errors[0], bytes[1], bytes[0]);
            const worth = largest >= vec.splat(least);
            const chosen = @select(u32, worth, nearer, @as(U, @splat(0)));
            return .{ chosen, inverse_of(chosen) };
        }

        pub inline fn inverse_of(bytes: U) F {
            const scale = scale_of(bytes);
            return @select(f32, scale > vec.splat(0), vec.splat(1) / scale, vec.splat(0));
        }

        pub inline fn scale_of_bytes(bytes: U) F {
            return scale_of(bytes);
        }

        /// Codes of 16 values.
        pub inline fn encode(x: F, inverse: F) I {
            const lowest: I = @splat(@bitCast(vec.round_magic - half));
            return nearest(x, inverse) -% lowest;
        }

        /// Levels were cut off before they became codes.
        pub inline fn clamp(codes: @Vector(64, i8)) @Vector(64, u8) {
            return @bitCast(codes);
        }
    };
}

/// The largest magnitude that can be packed: twice that is within the levels of the largest scale,
/// and it is a finite offset.
pub fn limit(comptime code_bits: comptime_int) f32 {
    const reach: f32 = (1 << (code_bits - 1)) - 0.5;
    return @min(57344.0, 61440.0 * reach / 2);
}

// ---- offsets ----

/// The upper byte of the f16 of 16 offsets, rounded to nearest even, and back.
pub inline fn to_offset(x: F) @Vector(16, u8) {
    const wide: U = vec.to_f16(16, x);
    const odd = wide >> @splat(8) & @as(U, @splat(1));
    return @truncate((wide + @as(U, @splat(0x7f)) + odd) >> @splat(8));
}

pub inline fn from_offset(bytes: @Vector(16, u8)) F {
    const wide: @Vector(16, u16) = bytes;
    return vec.from_f16(16, wide << @splat(8));
}

pub fn offset_at(offsets: [*]const u8, dim: usize) f32 {
    return vec.from_f16(1, .{@as(u16, offsets[dim]) << 8})[0];
}

test "codes are kept by every plane, whole groups and one by one" {
    inline for (
        .{ K(2), K(3), K(4), K(5), K(6) },
    ) |T| inline for (.{ Side.key, Side.value }) |side| {
        var prng = std.Random.DefaultPrng.init(3);
        var words: [512]u32 = undefined;
        for (&words) |*word| {
            const codes: [4]u8 = .{
                prng.random().uintLessThan(u8, 1 << T.bits),
                prng.random().uintLessThan(u8, 1 << T.bits),
                prng.random().uintLessThan(u8, 1 << T.bits),
                prng.random().uintLessThan(u8, 1 << T.bits),
            };
            word.* = @bitCast(codes);
        }
        var whole: [T.group_bytes]u8 = @splat(0xaa);
        T.pack_group(side, &words, &whole);
        var single: [T.group_bytes]u8 = @splat(0);
        const lanes = T.word_bytes(side) / 4;
        for (words, 0..) |word, i| {
            const bytes: [4]u8 = @bitCast(word);
            const w = i / lanes;
            const lane = i % lanes;
            for (bytes, 0..) |code, byte| {
                const slot, const dim = switch (side) {
                    .key => .{ lane, w * 4 + byte },
                    .value => .{ w + byte * 16, lane },
                };
                T.set(side, &single, slot, dim, code);
                try std.testing.expectEqual(code, T.get(side, &whole, slot, dim));
            }
        }
        try std.testing.expectEqualSlices(u8, &whole, &single);
        for (0..T.loads_per_group(side)) |l| {
            var at: usize = 0;
            while (at < lanes) : (at += 16) {
                const loaded = T.Loaded.init(side, &whole, l, at * 4);
                inline for (0..T.chunks_per_load) |which| {
                    const got: U = @bitCast(loaded.select(which));
                    const word = l * T.chunks_per_load + which;
                    try std.testing.expectEqual(vec.load(U, words[word * lanes + at ..].ptr), got);
                }
            }
        }
    };
}
