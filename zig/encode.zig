//! Writes tokens into pages: rows of f32 become rows of f16, or packed codes and scales. Called by
//! cache.zig through the kernel table (whole pages) and directly (single tokens, reading back).
const std = @import("std");
const vec = @import("vec.zig");
const encode_k = @import("encode_k.zig");
const format = @import("format.zig");
const k_format = @import("k_format.zig");
const narrow = @import("narrow.zig");
const rows_file = @import("rows.zig");
const F = vec.F;
const Half = format.Half;
const Next = rows_file.Next;
const Side = format.Side;
const Spread = rows_file.Spread;

/// 64 rows of f32, padded with zeros to the stored dimension, rotated where the half is rotated.
pub const PageArgs = extern struct {
    half: [*]u8,
    rows: [*]const f32, // (64, dim)
    dim: usize,
    /// To be fetched meanwhile.
    ahead: Next,
};

/// Packs a whole page of 64 tokens.
pub fn encode_page(comptime T: type, comptime side: Side, args: *const PageArgs) void {
    if (T.half_levels) return encode_k.encode_page(T, side, args);
    const groups = args.dim / format.group;
    const scales: [*]u16 = @ptrCast(@alignCast(args.half + groups * T.group_bytes));
    var ahead = args.ahead.over(groups * format.block_slots);
    for (0..groups) |g| {
        var inverses: [format.page_tokens]f32 = undefined;
        for (0..format.blocks_per_page) |block| {
            const inverse = encode_scales(T, args, g, block, scales);
            vec.store(@as([*]f32, &inverses) + block * 16, inverse);
        }
        if (side == .key) encode_key_group(
            T,
            args,
            g,
            &inverses,
            &ahead,
        ) else encode_value_group(T, args, g, &inverses, &ahead);
    }
}

/// Stores the scales of 16 tokens in a group; returns their inverses.
fn encode_scales(
    comptime T: type,
    args: *const PageArgs,
    g: usize,
    block: usize,
    scales: [*]u16,
) F {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    var ranks: [vec.lanes]T.Rank = undefined;
    inline for (&ranks, 0..) |*rank, t| {
        const row = args.rows + (block * 16 + t) * args.dim + g * format.group;
        rank.* = T.outer(T.rank(vec.load(F, row)), T.rank(vec.load(F, row + vec.lanes)));
    }
    const scale = T.scale(T.unrank(vec.fold_each(T.outer_of, T.Rank, vec.lanes, &ranks)));
    vec.store(scales + g * format.page_tokens + block * 16, scale);
    return T.inverse(vec.from_f16(16, scale));
}

/// Codes of 16 values of four tokens, of any quantized format: in each quarter four bytes of every
/// token.
pub inline fn encode_four(
    comptime T: type,
    rows: [*]const f32,
    stride: usize,
    inverses: [4]f32,
) narrow.Bytes {
    var rounded: [4]vec.I = undefined;
    inline for (&rounded, 0..) |*codes, k| {
        codes.* = T.encode(vec.load(F, rows + k * stride), vec.splat(inverses[k]));
    }
    return T.clamp(narrow.to_bytes(&rounded));
}

/// Sixteen tokens at a time: 16 dims of each become four words, a vector for all tokens.
fn encode_key_group(
    comptime T: type,
    args: *const PageArgs,
    g: usize,
    inverses: *const [format.page_tokens]f32,
    ahead: *Spread,
) void {
    const run_bytes = format.page_tokens * 4;
    const loads = format.group / 4 / T.chunks_per_load;
    for (0..format.blocks_per_page) |block| {
        inline for (0..2) |h| {
            var words: [4]narrow.Bytes = undefined;
            inline for (&words, 0..) |*word, k| {
                const slot = block * 16 + k * 4;
                if (h == 0) ahead.turn();
                const rows = args.rows + slot * args.dim + g * format.group + h * vec.lanes;
                word.* = encode_four(T, rows, args.dim, inverses[slot..][0..4].*);
            }
            const chunks = narrow.transpose_vectors(&words);
            const first = g * loads + h * 4 / T.chunks_per_load;
            inline for (0..4 / T.chunks_per_load) |k| {
                const target = args.half + (first + k) * run_bytes + block * 64;
                vec.store(target, if (T.bits == 8)
                    chunks[k]
                else
                    chunks[2 * k] | chunks[2 * k + 1] << @splat(4));
            }
        }
    }
}

fn encode_value_group(
    comptime T: type,
    args: *const PageArgs,
    g: usize,
    inverses: *const [format.page_tokens]f32,
    ahead: *Spread,
) void {
    const loads = format.block_slots / T.chunks_per_load;
    for (0..loads) |l| {
        inline for (0..T.chunks_per_load) |_| ahead.turn();
        inline for (0..2) |h| {
            var words: [T.chunks_per_load]narrow.Bytes = undefined;
            inline for (&words, 0..) |*word, which| {
                const slot = l * T.chunks_per_load + which;
                const rows = args.rows + slot * args.dim + g * format.group + h * vec.lanes;
                const stride = format.block_slots * args.dim;
                var of_slots: [4]f32 = undefined;
                inline for (&of_slots, 0..) |*x, k| x.* = inverses[slot + format.block_slots * k];
                word.* = narrow.transpose_quarters(encode_four(T, rows, stride, of_slots));
            }
            const target = args.half + (g * loads + l) * format.group * 4 + h * 64;
            vec.store(target, if (T.bits == 8) words[0] else words[0] | words[1] << @splat(4));
        }
    }
}

/// Packs one token's row (padded, rotated) into `slot`; the same bits as `encode_page` gives.
pub fn encode_token(
    half: Half,
    comptime side: Side,
    base: [*]u8,
    slot: usize,
    row: []const f32,
) void {
    switch (half.format) {
        inline else => |tag| {
            const T = format.all[@backingInt(tag)];
            if (!T.quantized) {
                const at = base + slot * half.row_bytes();
                var i: usize = 0;
                while (i < row.len) : (i += vec.lanes) {
                    T.store(at + i * @sizeOf(T.Element), vec.load(F, row.ptr + i));
                }
                return;
            }
            if (T.half_levels) return encode_k.encode_token(T, side, base, slot, row);
            const scales: [*]u16 = @ptrCast(@alignCast(@constCast(half.scales(base))));
            for (0..row.len / format.group) |g| {
                const a = vec.load(F, row.ptr + g * format.group);
                const b = vec.load(F, row.ptr + g * format.group + vec.lanes);
                const both = T.outer(T.rank(a), T.rank(b));
                const ranks = vec.fold_each(T.outer_of, T.Rank, 1, &.{both});
                const scale = T.scale(T.unrank(@splat(ranks[0])));
                scales[g * format.page_tokens + slot] = scale[0];
                const inverse = T.inverse(vec.from_f16(16, scale));
                inline for (.{ a, b }, 0..) |x, h| {
                    const rounded = T.encode(x, inverse);
                    const bytes = narrow.to_bytes(&.{ rounded, rounded, rounded, rounded });
                    const codes: [4 * vec.lanes]u8 = T.clamp(bytes);
                    inline for (0..vec.lanes) |i| {
                        const dim = g * format.group + h * vec.lanes + i;
                        T.set(side, base, slot, dim, codes[i / 4 * vec.lanes + i % 4]);
                    }
                }
            }
        },
    }
}

/// The values of one token as stored (still rotated) into `row` of the stored dimension.
pub fn decode_token(
    half: Half,
    comptime side: Side,
    base: [*]const u8,
    slot: usize,
    row: []f32,
) void {
    switch (half.format) {
        inline else => |tag| {
            const T = format.all[@backingInt(tag)];
            if (!T.quantized) {
                const at = base + slot * half.row_bytes();
                var i: usize = 0;
                while (i < row.len) : (i += vec.lanes) vec.store(
                    row.ptr + i,
                    T.load(at + i * @sizeOf(T.Element)),
                );
                return;
            }
            const scales = half.scales(base);
            for (row, 0..) |*x, dim| {
                const scale = T.scale_at(scales, dim / format.group * format.page_tokens + slot);
                x.* = T.value(T.get(side, base, slot, dim)) * scale;
            }
            if (!half.centred) return;
            const offsets = half.offsets(base);
            for (row, 0..) |*x, dim| x.* += k_format.offset_at(offsets, dim);
        },
    }
}

test "a page packed at once and token by token has the same bytes and values within half a step" {
    var prng = std.Random.DefaultPrng.init(11);
    const dim = 96;
    var rows: [format.page_tokens * dim]f32 = undefined;
    for (&rows) |*x| x.* = prng.random().floatNorm(f32);
    @memset(rows[5 * dim ..][0..dim], 0);
    inline for (
        .{ format.Format.q8, format.Format.q4 },
    ) |tag| inline for (.{ Side.key, Side.value }) |side| {
        const T = format.all[@backingInt(tag)];
        const half: Half = .{ .format = tag, .dim = dim, .slots = 64, .rotated = false };
        var whole: [format.page_tokens * dim * 2]u8 align(64) = @splat(0);
        var single: [format.page_tokens * dim * 2]u8 align(64) = @splat(0);
        encode_page(T, side, &.{ .half = &whole, .rows = &rows, .dim = dim, .ahead = .none });
        for (0..format.page_tokens) |t| encode_token(
            half,
            side,
            &single,
            t,
            rows[t * dim ..][0..dim],
        );
        try std.testing.expectEqualSlices(u8, &single, &whole);
        for (0..format.page_tokens) |t| {
            var row: [dim]f32 = undefined;
            decode_token(half, side, &whole, t, &row);
            for (0..dim) |d| {
                const scale = @abs(T.scale_at(half.scales(&whole), d / 32 * 64 + t));
                // q4 may clamp the value opposite to the largest one by a whole step.
                const bound: f32 = if (tag == .q4) 1.01 else 0.51;
                try std.testing.expectApproxEqAbs(
                    rows[t * dim + d],
                    row[d],
                    bound * scale + 1e-7,
                );
            }
        }
    };
}
