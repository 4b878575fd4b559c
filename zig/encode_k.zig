//! Packs rows in the formats of k_format.zig: whole pages and single tokens, with the same bits.
//! Rows of keys come relative to the offset of their page. Called by encode.zig.
const std = @import("std");
const encode = @import("encode.zig");
const format = @import("format.zig");
const k_format = @import("k_format.zig");
const narrow = @import("narrow.zig");
const vec = @import("vec.zig");
const F = vec.F;
const U = vec.U;
const Spread = @import("rows.zig").Spread;
const Side = format.Side;

pub fn encode_page(comptime T: type, comptime side: Side, args: *const encode.PageArgs) void {
    const groups = args.dim / format.group;
    const scales = args.half + groups * T.group_bytes;
    var words: [format.group * format.page_tokens / 4]u32 align(64) = undefined;
    var ahead = args.ahead.over(groups * format.blocks_per_page);
    for (0..groups) |g| {
        var inverses: [format.page_tokens]f32 = undefined;
        fit_group(T, args, g, scales + g * format.page_tokens, &inverses, &ahead);
        if (side == .key)
            key_words(T, args, g, &inverses, &words)
        else
            value_words(T, args, g, &inverses, &words);
        T.pack_group(side, &words, args.half + g * T.group_bytes);
    }
}

/// The two halves of a row's group.
inline fn load_group(rows: [*]const f32, dim: usize, slot: usize, g: usize) [2]F {
    const row = rows + slot * dim + g * format.group;
    return .{ vec.load(F, row), vec.load(F, row + vec.lanes) };
}

/// Finds the scales of a group, and the inverses of what they stand for. Each step is taken for all
/// blocks of 16 tokens before the next: what is found for a block takes long to come out of the
/// processor, which has the other blocks to do meanwhile.
fn fit_group(
    comptime T: type,
    args: *const encode.PageArgs,
    g: usize,
    scales: [*]u8,
    inverses: *[format.page_tokens]f32,
    ahead: *Spread,
) void {
    var largest: [format.blocks_per_page]F = undefined;
    var first: [format.blocks_per_page][vec.lanes]f32 = undefined;
    for (&largest, &first, 0..) |*of_block, *inverse, block| {
        ahead.turn();
        of_block.* = find_largest(args, g, block);
        inverse.* = T.first_inverse(of_block.*);
    }
    var bytes: [format.blocks_per_page][2]U = undefined;
    for (&bytes, &first, 0..) |*around, *inverse, block| {
        around.* = T.bytes_around(fit(T, args, g, block, inverse));
    }
    var errors: [format.blocks_per_page][2]F = undefined;
    for (&errors, bytes, 0..) |*pair, around, block| for (pair, around) |*summed, tried| {
        summed.* = sum_errors(T, args, g, block, tried);
    };
    for (largest, bytes, errors, 0..) |most, around, pair, block| {
        const chosen, const inverse = T.choose(most, around, pair);
        const at = block * vec.lanes;
        vec.store(scales + at, @as(@Vector(16, u8), @truncate(chosen)));
        vec.store(@as([*]f32, inverses) + at, inverse);
    }
}

/// The largest magnitudes of 16 tokens' groups, in a lane each.
fn find_largest(args: *const encode.PageArgs, g: usize, block: usize) F {
    @setEvalBranchQuota(100_000); // the shuffles of the fold
    var parts: [vec.lanes]F = undefined;
    for (&parts, 0..) |*part, t| {
        const x = load_group(args.rows, args.dim, block * vec.lanes + t, g);
        part.* = vec.max(@abs(x[0]), @abs(x[1]));
    }
    return vec.fold_each(.max, F, vec.lanes, &parts);
}

/// The scales whose levels, as a first scale has chosen them, are nearest by least squares.
fn fit(
    comptime T: type,
    args: *const encode.PageArgs,
    g: usize,
    block: usize,
    inverses: *const [vec.lanes]f32,
) F {
    @setEvalBranchQuota(100_000); // the shuffles of the folds
    var parts: [vec.lanes]F = undefined;
    var squares: [vec.lanes]F = undefined;
    for (&parts, &squares, inverses, 0..) |*part, *square, inverse, t| {
        const x = load_group(args.rows, args.dim, block * vec.lanes + t, g);
        part.*, square.* = match(T, x, inverse);
    }
    const products = vec.fold_each(.add, F, vec.lanes, &parts);
    return products / vec.fold_each(.add, F, vec.lanes, &squares);
}

/// The square errors that scales leave.
fn sum_errors(
    comptime T: type,
    args: *const encode.PageArgs,
    g: usize,
    block: usize,
    bytes: U,
) F {
    @setEvalBranchQuota(100_000); // the shuffles of the fold
    const scales: [vec.lanes]f32 = T.scale_of_bytes(bytes);
    const inverses: [vec.lanes]f32 = T.inverse_of(bytes);
    var parts: [vec.lanes]F = undefined;
    for (&parts, scales, inverses, 0..) |*part, scale, inverse, t| {
        const x = load_group(args.rows, args.dim, block * vec.lanes + t, g);
        part.* = square_error(T, x, scale, inverse);
    }
    return vec.fold_each(.add, F, vec.lanes, &parts);
}

/// Products of values with their levels, and squares of the levels, of both halves together.
inline fn match(comptime T: type, x: [2]F, inverse: f32) struct { F, F } {
    const a = T.levels(x[0], vec.splat(inverse));
    const b = T.levels(x[1], vec.splat(inverse));
    return .{ x[0] * a + x[1] * b, a * a + b * b };
}

inline fn square_error(comptime T: type, x: [2]F, scale: f32, inverse: f32) F {
    var squares: [2]F = undefined;
    inline for (x, &squares) |part, *square| {
        const off = vec.minus_exact(part, T.levels(part, vec.splat(inverse)), vec.splat(scale));
        square.* = off * off;
    }
    return squares[0] + squares[1];
}

/// Sixteen tokens at a time: 16 dims of each become four words, transposed to (chunk, slot).
fn key_words(
    comptime T: type,
    args: *const encode.PageArgs,
    g: usize,
    inverses: *const [format.page_tokens]f32,
    words: [*]u32,
) void {
    for (0..format.blocks_per_page) |block| inline for (0..2) |h| {
        var of_tokens: [4]narrow.Bytes = undefined;
        inline for (&of_tokens, 0..) |*four, k| {
            const slot = block * format.block_slots + k * 4;
            const rows = args.rows + slot * args.dim + g * format.group + h * vec.lanes;
            four.* = encode.encode_four(T, rows, args.dim, inverses[slot..][0..4].*);
        }
        for (narrow.transpose_vectors(&of_tokens), 0..) |of_chunk, chunk| {
            const first = (h * 4 + chunk) * format.page_tokens + block * format.block_slots;
            vec.store(words + first, of_chunk);
        }
    };
}

/// The tokens j, j+16, j+32, j+48 of a dimension become one word.
fn value_words(
    comptime T: type,
    args: *const encode.PageArgs,
    g: usize,
    inverses: *const [format.page_tokens]f32,
    words: [*]u32,
) void {
    for (0..format.block_slots) |quad| inline for (0..2) |h| {
        const rows = args.rows + quad * args.dim + g * format.group + h * vec.lanes;
        var of_slots: [4]f32 = undefined;
        inline for (&of_slots, 0..) |*x, k| x.* = inverses[quad + format.block_slots * k];
        const four = encode.encode_four(T, rows, format.block_slots * args.dim, of_slots);
        vec.store(words + quad * format.group + h * vec.lanes, narrow.transpose_quarters(four));
    };
}

/// Packs one token's row into `slot`.
pub fn encode_token(
    comptime T: type,
    comptime side: Side,
    base: [*]u8,
    slot: usize,
    row: []const f32,
) void {
    const groups = row.len / format.group;
    const scales = base + groups * T.group_bytes;
    for (0..groups) |g| {
        const x = load_group(row.ptr, row.len, 0, g);
        const largest = vec.splat(vec.reduce(.max, vec.max(@abs(x[0]), @abs(x[1]))));
        const products, const squares = match(T, x, T.first_inverse(largest)[0]);
        const fitted = vec.splat(vec.reduce(.add, products) / vec.reduce(.add, squares));
        const bytes = T.bytes_around(fitted);
        var errors: [2]F = undefined;
        for (bytes, &errors) |tried, *summed| {
            const scale = T.scale_of_bytes(tried)[0];
            const off = square_error(T, x, scale, T.inverse_of(tried)[0]);
            summed.* = vec.splat(vec.reduce(.add, off));
        }
        const chosen, const inverse = T.choose(largest, bytes, errors);
        scales[g * format.page_tokens + slot] = @truncate(chosen[0]);
        inline for (x, 0..) |part, h| {
            const codes: [vec.lanes]i32 = T.encode(part, inverse);
            for (codes, 0..) |code, i| {
                const dim = g * format.group + h * vec.lanes + i;
                T.set(side, base, slot, dim, @intCast(code));
            }
        }
    }
}

/// Rows of keys (count, dim) and the offset of their page (dim).
pub const OffsetArgs = extern struct {
    rows: [*]f32,
    count: usize,
    dim: usize,
    offsets: [*]u8,
};

/// The offset of a page's keys: about the mean of the rows, added in their order. See
/// `k_format.to_offset`.
pub fn store_offsets(args: *const OffsetArgs) void {
    const share: f32 = 1.0 / @as(f32, @floatFromInt(args.count));
    var d: usize = 0;
    while (d < args.dim) : (d += format.group) {
        var total: [2]F = @splat(vec.splat(0));
        for (0..args.count) |i| {
            const row = args.rows + i * args.dim + d;
            inline for (&total, 0..) |*sum, h| sum.* += vec.load(F, row + h * vec.lanes);
        }
        inline for (total, 0..) |sum, h| {
            const offsets = k_format.to_offset(sum * vec.splat(share));
            vec.store(args.offsets + d + h * vec.lanes, offsets);
        }
    }
}

/// Makes rows relative to the offset of their page.
pub fn subtract_offsets(args: *const OffsetArgs) void {
    var d: usize = 0;
    while (d < args.dim) : (d += vec.lanes) {
        const offset = k_format.from_offset(vec.load(@Vector(16, u8), args.offsets + d));
        for (0..args.count) |i| {
            const at = args.rows + i * args.dim + d;
            vec.store(at, vec.load(F, at) - offset);
        }
    }
}

test "a page packed at once and token by token has the same bytes and fits as well as it can" {
    var prng = std.Random.DefaultPrng.init(12);
    const dim = 96;
    var rows: [format.page_tokens * dim]f32 = undefined;
    for (&rows) |*x| x.* = prng.random().floatNorm(f32);
    @memset(rows[5 * dim ..][0..dim], 0);
    for (rows[6 * dim ..][0..dim]) |*x| x.* *= 0x1p-16;
    inline for (
        .{ k_format.K(2), k_format.K(3), k_format.K(4), k_format.K(5), k_format.K(6) },
    ) |T| inline for (.{ Side.key, Side.value }) |side| {
        var whole: [format.page_tokens * dim]u8 align(64) = @splat(0);
        var single: [format.page_tokens * dim]u8 align(64) = @splat(0);
        encode_page(T, side, &.{ .half = &whole, .rows = &rows, .dim = dim, .ahead = .none });
        for (0..format.page_tokens) |t| {
            encode_token(T, side, &single, t, rows[t * dim ..][0..dim]);
        }
        try std.testing.expectEqualSlices(u8, &single, &whole);
        const scales: [*]const u8 = @as([*]const u8, &whole) + 3 * T.group_bytes;
        for (0..format.page_tokens) |t| for (0..dim) |d| {
            const block: [16]f32 = T.load_scales(scales, d / 32 * 64 + t / 16 * 16);
            const scale = block[t % 16];
            const got = T.value(T.get(side, &whole, t, d)) * scale;
            // A fitted scale clamps some, but by no more than it gains elsewhere.
            const step = @max(scale, 0x1p-17);
            try std.testing.expect(@abs(rows[t * dim + d] - got) <= 1.6 * step);
        };
    };
}
