//! Writes tokens into pages: rows of f32 become rows of f16, or packed codes and scales. Called by
//! cache.zig through the kernel table (whole pages) and directly (single tokens, reading back).
const std = @import("std");
const vec = @import("vec.zig");
const encode_k = @import("encode_k.zig");
const format = @import("format.zig");
const k_format = @import("k_format.zig");
const narrow = @import("narrow.zig");
const rows_file = @import("rows.zig");
const Config = @import("config.zig").Config;
const F = vec.F;
const Half = format.Half;
const Next = rows_file.Next;
const Rows = rows_file.Rows;
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
    var ahead = args.ahead.over(turns(args.dim));
    const jump = if (side == .key) 4 else format.block_slots;
    const first = if (side == .key) block_rows else 4;
    for (0..format.blocks_per_page) |number| {
        const block: Block(null, jump) = .{
            .number = number,
            .rows = args.rows + number * first * args.dim,
            .given_dim = args.dim,
        };
        encode_block(T, side, args.half, block, &ahead);
    }
}

/// Rows where they lie, and what they are packed into.
pub const PackArgs = extern struct {
    half: [*]u8,
    rows: Rows, // of 64 tokens
    /// Room for 16 rows.
    memory: [*]f32,
    dim: usize,
    /// As of `rows_file.ReadArgs`.
    tail_format: u32,
    rotated: bool,
    limit: f32,
    /// To be fetched meanwhile.
    ahead: Next,
};

/// Reads and packs a whole page of 64 tokens, a quarter at a time, so that rows stay in the nearest
/// cache. Returns whether all magnitudes are numbers up to `limit`.
pub fn pack_page(comptime T: type, comptime side: Side, args: *const PackArgs) bool {
    // A known dimension makes quick addresses.
    if (vec.wide_registers and args.dim == 128) return pack_blocks(T, side, 128, args);
    return pack_blocks(T, side, null, args);
}

fn pack_blocks(
    comptime T: type,
    comptime side: Side,
    comptime dim: ?usize,
    args: *const PackArgs,
) bool {
    var ahead = args.ahead.over(turns(args.dim));
    var accepted = true;
    for (0..format.blocks_per_page) |number| {
        const within = rows_file.read(&.{
            .rows = args.rows,
            .first = number * block_rows,
            .count = block_rows,
            .in_quads = side == .value,
            .target = args.memory,
            .dim_stored = args.dim,
            .tail_format = args.tail_format,
            .rotated = args.rotated,
            .limit = args.limit,
        });
        accepted = accepted and within;
        const block: Block(dim, 4) = .{
            .number = number,
            .rows = args.memory,
            .given_dim = args.dim,
        };
        encode_block(T, side, args.half, block, &ahead);
    }
    return accepted;
}

/// Rows that are packed together: four times four that follow each other. Keys' are those of 16
/// slots in a row. Values' are those of four slots in a row and of the slots 16, 32 and 48 further
/// on, with which they share words.
/// From the first of four to the first of the next there are `jump` rows.
fn Block(comptime known_dim: ?usize, comptime jump: usize) type {
    return struct {
        number: usize,
        rows: [*]const f32,
        given_dim: usize,

        const Self = @This();

        inline fn dim(block: Self) usize {
            return known_dim orelse block.given_dim;
        }

        /// Half a group of a row.
        inline fn part(block: Self, i: usize, g: usize, h: usize) [*]const f32 {
            const row = i / 4 * jump + i % 4;
            return block.rows + row * block.dim() + g * format.group + h * vec.lanes;
        }

        inline fn next_four(block: Self) usize {
            return jump * block.dim();
        }
    };
}

const block_rows = format.page_tokens / format.blocks_per_page;
const groups_max = Config.dim_max / format.group;

fn turns(dim: usize) usize {
    return dim / format.group * format.block_slots;
}

fn encode_block(
    comptime T: type,
    comptime side: Side,
    half: [*]u8,
    block: anytype,
    ahead: *Spread,
) void {
    const groups = block.dim() / format.group;
    const scales: [*]u16 = @ptrCast(@alignCast(half + groups * T.group_bytes));
    var inverses: [groups_max][block_rows]f32 = undefined;
    for (0..groups) |g| {
        const scale = T.scale(find_largest(T, block, g));
        inverses[g] = T.inverse(vec.from_f16(16, scale));
        const of_group = scales + g * format.page_tokens;
        if (side == .key) vec.store(of_group + block.number * block_rows, scale) else {
            const quads: [4]u64 = @bitCast(scale);
            for (quads, 0..) |quad, k| {
                vec.store(of_group + k * format.block_slots + block.number * 4, quad);
            }
        }
    }
    for (0..groups) |g| {
        const codes = half + g * T.group_bytes;
        if (side == .key)
            encode_key_group(T, block, g, codes, &inverses[g], ahead)
        else
            encode_value_group(T, block, g, codes, &inverses[g], ahead);
    }
}

/// The outermost values of 16 tokens in a group.
inline fn find_largest(comptime T: type, block: anytype, g: usize) F {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    var ranks: [vec.lanes]T.Rank = undefined;
    inline for (&ranks, 0..) |*rank, t| {
        const x = .{ vec.load(F, block.part(t, g, 0)), vec.load(F, block.part(t, g, 1)) };
        rank.* = T.outer(T.rank(x[0]), T.rank(x[1]));
    }
    return T.unrank(vec.fold_each(T.outer_of, T.Rank, vec.lanes, &ranks));
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

/// 16 dims of each token become four words, a vector for all tokens.
inline fn encode_key_group(
    comptime T: type,
    block: anytype,
    g: usize,
    codes: [*]u8,
    inverses: *const [block_rows]f32,
    ahead: *Spread,
) void {
    const run_bytes = format.page_tokens * 4;
    inline for (0..2) |h| {
        var words: [4]narrow.Bytes = undefined;
        inline for (&words, 0..) |*word, k| {
            if (h == 0) ahead.turn();
            const rows = block.part(4 * k, g, h);
            word.* = encode_four(T, rows, block.dim(), inverses[4 * k ..][0..4].*);
        }
        const chunks = narrow.transpose_vectors(&words);
        const first = h * 4 / T.chunks_per_load;
        inline for (0..4 / T.chunks_per_load) |k| {
            const target = codes + (first + k) * run_bytes + block.number * 64;
            vec.store(target, if (T.bits == 8)
                chunks[k]
            else
                chunks[2 * k] | chunks[2 * k + 1] << @splat(4));
        }
    }
}

inline fn encode_value_group(
    comptime T: type,
    block: anytype,
    g: usize,
    codes: [*]u8,
    inverses: *const [block_rows]f32,
    ahead: *Spread,
) void {
    inline for (0..4 / T.chunks_per_load) |l| {
        inline for (0..T.chunks_per_load) |_| ahead.turn();
        inline for (0..2) |h| {
            var words: [T.chunks_per_load]narrow.Bytes = undefined;
            inline for (&words, 0..) |*word, which| {
                const first = l * T.chunks_per_load + which;
                const rows = block.part(first, g, h);
                var of_slots: [4]f32 = undefined;
                inline for (&of_slots, 0..) |*x, k| x.* = inverses[first + 4 * k];
                const four = encode_four(T, rows, block.next_four(), of_slots);
                word.* = narrow.transpose_quarters(four);
            }
            const load = block.number * 4 / T.chunks_per_load + l;
            const target = codes + load * format.group * 4 + h * 64;
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

test "a page that is read while it is packed has the same bytes, and is refused if it should be" {
    var prng = std.Random.DefaultPrng.init(12);
    const dim = 96;
    var rows: [format.page_tokens * dim]f32 = undefined;
    for (&rows) |*x| x.* = prng.random().floatNorm(f32);
    const given: Half = .{ .format = .f32, .dim = dim, .slots = 64, .rotated = false };
    inline for (.{ format.Q8, format.Q4 }) |T| inline for (.{ Side.key, Side.value }) |side| {
        var whole: [format.page_tokens * dim * 2]u8 align(64) = @splat(0);
        var read: [format.page_tokens * dim * 2]u8 align(64) = @splat(0);
        encode_page(T, side, &.{ .half = &whole, .rows = &rows, .dim = dim, .ahead = .none });
        var memory: [block_rows * dim]f32 = undefined;
        var args: PackArgs = .{
            .half = &read,
            .rows = rows_file.of_half(given, @ptrCast(&rows), format.page_tokens, dim),
            .memory = &memory,
            .dim = dim,
            .tail_format = @backingInt(format.Format.f32),
            .rotated = false,
            .limit = 100,
            .ahead = .none,
        };
        try std.testing.expect(pack_page(T, side, &args));
        try std.testing.expectEqualSlices(u8, &whole, &read);
        const before = rows[77];
        defer rows[77] = before;
        for ([_]bool{ false, true }) |rotated| for ([_]f32{
            99, 101, std.math.inf(f32), std.math.nan(f32),
        }, 0..) |x, i| {
            args.rotated = rotated;
            rows[77] = x;
            try std.testing.expectEqual(i == 0, pack_page(T, side, &args));
        };
    };
}
