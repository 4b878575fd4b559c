//! Storage formats and the layout of pages. A format is a type; `all` is the only list of formats,
//! in the order of `abi.Format`. A page holds up to 64 tokens of one kv head: a key half, then a
//! value half, each run of it 64-byte aligned. docs/format.md describes the bytes. Used by every
//! file below cache.zig.
const std = @import("std");
const assert = std.debug.assert;
const abi = @import("abi.zig");
const k_format = @import("k_format.zig");
const dot = @import("dot.zig");
const vec = @import("vec.zig");

/// Tokens of a page, and the window that kernels work on at once.
pub const page_tokens = 64;
/// Values that share a scale.
pub const group = 32;
/// Slots that kernels compute together.
pub const block_slots = 16;
pub const blocks_per_page = page_tokens / block_slots;

pub const all = .{ F32, F16, BF16, Q8, Q4, Q2K, Q3K, Q4K, Q5K, Q6K };
pub const count = all.len;
pub const Format = abi.Format;

comptime {
    for (all, 0..) |T, index| assert(
        std.mem.eql(u8, T.name, @tagName(@as(Format, @fromBackingInt(index)))),
    );
}

pub const F32 = Float("f32", f32);
pub const F16 = Float("f16", f16);
pub const BF16 = Float("bf16", u16);
pub const Q8 = Integer(8);
pub const Q4 = Integer(4);
pub const Q2K = k_format.K(2);
pub const Q3K = k_format.K(3);
pub const Q4K = k_format.K(4);
pub const Q5K = k_format.K(5);
pub const Q6K = k_format.K(6);

/// Keys or values: their codes are interleaved for different dot products.
pub const Side = enum(u1) { key = 0, value = 1 };

/// Floating-point rows, token after token: (slot, dim).
fn Float(comptime format_name: []const u8, comptime Stored: type) type {
    return struct {
        pub const name = format_name;
        pub const quantized = false;
        pub const Element = Stored;

        pub inline fn load(source: [*]const u8) vec.F {
            return switch (Element) {
                f32 => vec.load(vec.F, source),
                f16 => vec.from_f16(16, vec.load(@Vector(16, u16), source)),
                u16 => vec.from_bf16(16, vec.load(@Vector(16, u16), source)),
                else => comptime unreachable,
            };
        }

        pub inline fn store(target: [*]u8, x: vec.F) void {
            switch (Element) {
                f32 => vec.store(target, x),
                f16 => vec.store(target, vec.to_f16(16, x)),
                u16 => vec.store(target, vec.to_bf16(16, x)),
                else => comptime unreachable,
            }
        }
    };
}

/// Integer codes in groups of 32 along the dimension, with one f16 scale a group: value = code *
/// scale.
///
/// q8 maps the group's largest magnitude to 127. q4 maps the signed value of largest magnitude to
/// -8 (the rule of ggml's q4_0, which uses all 16 levels), so its scale may be negative.
fn Integer(comptime code_bits: comptime_int) type {
    return struct {
        pub const name = std.fmt.comptimePrint("q{d}", .{code_bits});
        pub const quantized = true;
        pub const half_levels = false;
        pub const bits = code_bits;
        pub const Scale = f16;
        /// Stored code minus this is the code.
        pub const offset = if (bits == 4) 8 else 0;
        pub const code_min = if (bits == 4) -8 else -127;
        pub const code_max = if (bits == 4) 7 else 127;
        /// Int8 planes of the query: one adds less error to q4 than storing did, q8 needs two.
        pub const query_planes = if (bits == 4) 1 else 2;
        /// Chunks of four dimensions whose codes one load brings.
        pub const chunks_per_load = 8 / bits;

        pub const group_bytes = group * page_tokens * bits / 8;

        pub fn loads_per_group(side: Side) usize {
            const words: usize = if (side == .key) group / 4 else block_slots;
            return words / chunks_per_load;
        }

        /// The codes of `chunks_per_load` words, for 16 lanes from byte `at` of every word on.
        pub const Loaded = struct {
            codes: dot.Codes,

            /// The words of load `l` of a group, whose codes begin at `codes`.
            pub inline fn init(side: Side, codes: [*]const u8, l: usize, at: usize) Loaded {
                const word_bytes: usize = if (side == .key) page_tokens * 4 else group * 4;
                const source = codes + l * word_bytes + at;
                return .{ .codes = if (bits == 8 and side == .key)
                    dot.load_signed_codes(source)
                else
                    vec.load(dot.Codes, source) };
            }

            /// The codes of word `which` of the load, a byte each.
            pub inline fn select(loaded: Loaded, comptime which: usize) dot.Codes {
                if (bits == 8) return loaded.codes;
                const codes = loaded.codes;
                return if (which == 0) dot.low_nibbles(codes) else dot.high_nibbles(codes);
            }
        };

        /// 16 scales from `index` on.
        pub inline fn load_scales(scales: [*]const u8, index: usize) vec.F {
            return vec.from_f16(16, vec.load(@Vector(16, u16), scales + index * 2));
        }

        /// The highest ranks, by magnitude, among 64 scales from `index` on.
        pub inline fn scale_ranks(scales: [*]const u8, index: usize) vec.U {
            const magnitude: dot.Halves = @splat(0x7fff);
            const low = vec.load(dot.Halves, scales + index * 2) & magnitude;
            const high = vec.load(dot.Halves, scales + index * 2 + 64) & magnitude;
            const pairs: vec.U = @bitCast(@max(low, high));
            return @max(pairs & @as(vec.U, @splat(0xffff)), pairs >> @splat(16));
        }

        pub inline fn scale_of_rank(comptime n: usize, ranks: @Vector(n, u32)) @Vector(n, f32) {
            return vec.from_f16(n, @truncate(ranks));
        }

        pub inline fn scale_at(scales: [*]const u8, index: usize) f32 {
            return vec.from_f16(1, .{vec.load(u16, scales + index * 2)})[0];
        }

        /// A value in a form in which outer ones are quickly found. To q8 signs are all the same.
        pub const Rank = if (bits == 8) vec.U else vec.Rank;
        pub const outer_of: vec.Reduction = if (bits == 8) .max else .outer;

        pub inline fn rank(x: vec.F) Rank {
            return if (bits == 8) @bitCast(@abs(x)) else vec.rank(x);
        }

        pub inline fn outer(a: Rank, b: Rank) Rank {
            return if (bits == 8) @max(a, b) else vec.outer(a, b);
        }

        pub inline fn unrank(ranks: Rank) vec.F {
            return if (bits == 8) @bitCast(ranks) else vec.unrank(ranks);
        }

        /// The f16 scales of 16 groups whose outermost values are given, as bits.
        pub inline fn scale(largest: vec.F) @Vector(16, u16) {
            const exact = if (bits == 8)
                largest / vec.splat(127)
            else
                largest * vec.splat(-0.125);
            // What would round to a zero of either sign is plain zero.
            const vanishes = @abs(exact) <= vec.splat(0x1p-25);
            return vec.to_f16(16, @select(f32, vanishes, vec.splat(0), exact));
        }

        pub inline fn inverse(scales: vec.F) vec.F {
            const zero = vec.splat(0);
            return @select(f32, scales != zero, vec.splat(1) / scales, zero);
        }

        /// What 16 values over their scale are rounded to.
        pub inline fn encode(x: vec.F, inverse_scale: vec.F) vec.I {
            return vec.round_to_int(x * inverse_scale);
        }

        /// Rounded values in bytes, of any sign and size, become codes with `offset` added.
        pub inline fn clamp(rounded: @Vector(64, i8)) @Vector(64, u8) {
            const least: @Vector(64, i8) = @splat(code_min);
            const codes = @max(rounded, least);
            if (bits == 8) return @bitCast(codes); // no byte is above code_max
            const most: @Vector(64, i8) = @splat(code_max);
            return @bitCast(@min(codes, most) +% @as(@Vector(64, i8), @splat(offset)));
        }

        pub const Place = struct { byte: usize, high: bool };

        /// Where the code of (slot, dim) lies in the codes of a half.
        pub fn place(side: Side, slot: usize, dim: usize) Place {
            const g = dim / group;
            const d = dim % group;
            // Keys: the four dims of a chunk are one word per token. Values: the four tokens j,
            // j+16, j+32, j+48 are one word per dim. 4-bit codes of two neighbouring words share
            // one.
            const word, const index, const within = switch (side) {
                .key => .{ d / 4, slot, d % 4 },
                .value => .{ slot % block_slots, d, slot / block_slots },
            };
            const words_per_group: usize = if (side == .key) group / 4 else block_slots;
            const word_bytes: usize = if (side == .key) page_tokens * 4 else group * 4;
            if (bits == 8) return .{
                .byte = (g * words_per_group + word) * word_bytes + index * 4 + within,
                .high = false,
            };
            const pair = g * words_per_group / 2 + word / 2;
            return .{ .byte = pair * word_bytes + index * 4 + within, .high = word % 2 == 1 };
        }

        /// The stored code (`offset` included) of (slot, dim).
        pub fn get(side: Side, codes: [*]const u8, slot: usize, dim: usize) u8 {
            const at = place(side, slot, dim);
            if (bits == 8) return codes[at.byte];
            return if (at.high) codes[at.byte] >> 4 else codes[at.byte] & 15;
        }

        pub fn set(side: Side, codes: [*]u8, slot: usize, dim: usize, code: u8) void {
            const at = place(side, slot, dim);
            if (bits == 8) {
                codes[at.byte] = code;
            } else if (at.high) {
                codes[at.byte] = (codes[at.byte] & 0x0f) | (code << 4);
            } else {
                codes[at.byte] = (codes[at.byte] & 0xf0) | (code & 15);
            }
        }

        /// The code as a number.
        pub fn value(code: u8) f32 {
            if (bits == 8) return @floatFromInt(@as(i8, @bitCast(code)));
            return @as(f32, @floatFromInt(code)) - offset;
        }
    };
}

/// The layout of one half (keys or values) of a page.
pub const Half = struct {
    format: Format,
    dim: u32,
    /// Token slots: 64 for quantized formats, any multiple of 16 for floating point.
    slots: u32,
    rotated: bool,
    /// Rows are stored relative to an offset of their page.
    centred: bool = false,

    pub fn quantized(half: Half) bool {
        return switch (half.format) {
            inline else => |tag| all[@backingInt(tag)].quantized,
        };
    }

    /// Dimensions as stored: groups of 32, or vectors of 16, are always whole.
    pub fn dim_stored(half: Half) usize {
        return std.mem.alignForward(usize, half.dim, if (half.quantized()) group else vec.lanes);
    }

    pub fn groups(half: Half) usize {
        return half.dim_stored() / group;
    }

    /// Bytes of one token's row (floating point only).
    pub fn row_bytes(half: Half) usize {
        assert(!half.quantized());
        return half.dim_stored() * (if (half.format == .f32) @as(usize, 4) else 2);
    }

    pub fn code_bytes(half: Half) usize {
        switch (half.format) {
            inline else => |tag| {
                const T = all[@backingInt(tag)];
                if (!T.quantized) return half.slots * half.row_bytes();
                return half.groups() * T.group_bytes;
            },
        }
    }

    pub fn scale_bytes(half: Half) usize {
        switch (half.format) {
            inline else => |tag| {
                const T = all[@backingInt(tag)];
                if (!T.quantized) return 0;
                return half.slots * half.groups() * @sizeOf(T.Scale);
            },
        }
    }

    pub fn bytes(half: Half) usize {
        if (half.quantized()) assert(half.slots == page_tokens);
        assert(half.slots % block_slots == 0);
        const used = half.code_bytes() + half.scale_bytes();
        if (!half.centred) return used;
        return std.mem.alignForward(usize, used + half.dim_stored(), 64);
    }

    /// Scales of a quantized half: (group, slot), each of the format's `Scale`.
    pub fn scales(half: Half, base: [*]const u8) [*]const u8 {
        return base + half.code_bytes();
    }

    /// Offsets of a centred half: (dimension), a byte each.
    pub fn offsets(half: Half, base: [*]const u8) [*]const u8 {
        return base + half.code_bytes() + half.scale_bytes();
    }
};

test "places of codes are a bijection onto the bytes of a half" {
    inline for (.{ Q8, Q4 }) |T| for ([_]Side{ .key, .value }) |side| {
        const dims = 64;
        var seen: [page_tokens * dims]bool = @splat(false);
        for (0..page_tokens) |slot| for (0..dims) |dim| {
            const at = T.place(side, slot, dim);
            const index = if (T.bits == 8) at.byte else at.byte * 2 + @intFromBool(at.high);
            try std.testing.expect(!seen[index]);
            seen[index] = true;
        };
    };
}

test "halves count their bytes with scales and padding" {
    const q4: Half = .{ .format = .q4, .dim = 128, .slots = 64, .rotated = true };
    try std.testing.expectEqual(@as(usize, 64 * 128 * 9 / 16), q4.bytes());
    const q8: Half = .{ .format = .q8, .dim = 33, .slots = 64, .rotated = false };
    try std.testing.expectEqual(@as(usize, 64 * 64 + 64 * 2 * 2), q8.bytes());
    const f16_half: Half = .{ .format = .f16, .dim = 80, .slots = 16, .rotated = false };
    try std.testing.expectEqual(@as(usize, 16 * 80 * 2), f16_half.bytes());
}
