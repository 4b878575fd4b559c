//! Packs rows in the formats of k_format.zig: whole pages and single tokens, with the same bits.
//! Rows of keys come relative to the offset of their page. Called by encode.zig.
const std = @import("std");
const encode = @import("encode.zig");
const format = @import("format.zig");
const k_format = @import("k_format.zig");
const vec = @import("vec.zig");
const F = vec.F;
const U = vec.U;
const Side = format.Side;

pub fn encode_page(comptime T: type, comptime side: Side, args: *const encode.PageArgs) void {
    const groups = args.dim / format.group;
    const scales = args.half + groups * T.group_bytes;
    var words: [format.group * format.page_tokens / 4]u32 align(64) = undefined;
    var ahead = args.ahead.over(groups * format.blocks_per_page);
    for (0..groups) |g| {
        var inverses: [format.page_tokens]f32 = undefined;
        for (0..format.blocks_per_page) |block| {
            ahead.turn();
            const at = g * format.page_tokens + block * vec.lanes;
            const fitted = fit_block(T, args.rows + block * vec.lanes * args.dim, args.dim, g);
            vec.store(scales + at, @as(@Vector(16, u8), @truncate(fitted.bytes)));
            vec.store(@as([*]f32, &inverses) + block * vec.lanes, fitted.inverses);
        }
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

const Fitted = struct { bytes: U, inverses: F };

/// Scales of a group of 16 tokens, in a lane each.
fn fit_block(comptime T: type, rows: [*]const f32, dim: usize, g: usize) Fitted {
    @setEvalBranchQuota(100_000); // the shuffles of the folds
    var parts: [vec.lanes]F = undefined;
    for (&parts, 0..) |*part, t| {
        const x = load_group(rows, dim, t, g);
        part.* = vec.max(@abs(x[0]), @abs(x[1]));
    }
    const largest = vec.fold_each(.max, F, vec.lanes, &parts);
    const first: [vec.lanes]f32 = T.first_inverse(largest);
    var squares: [vec.lanes]F = undefined;
    for (&parts, &squares, first, 0..) |*part, *square, inverse, t| {
        part.*, square.* = match(T, load_group(rows, dim, t, g), inverse);
    }
    const products = vec.fold_each(.add, F, vec.lanes, &parts);
    const fitted = products / vec.fold_each(.add, F, vec.lanes, &squares);
    const bytes = T.bytes_around(fitted);
    var errors: [2]F = undefined;
    for (bytes, &errors) |tried, *summed| {
        const scales: [vec.lanes]f32 = T.scale_of_bytes(tried);
        const inverses: [vec.lanes]f32 = T.inverse_of(tried);
        for (&parts, scales, inverses, 0..) |*part, scale, inverse, t| {
            part.* = square_error(T, load_group(rows, dim, t, g), scale, inverse);
        }
        summed.* = vec.fold_each(.add, F, vec.lanes, &parts);
    }
    const chosen, const inverses = T.choose(largest, bytes, errors);
    return .{ .bytes = chosen, .inverses = inverses };
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
        const off = part - T.levels(part, vec.splat(inverse)) * vec.splat(scale);
        square.* = off * off;
    }
    return squares[0] + squares[1];
}

/// Four tokens at a time: 16 dims of each become four words, transposed to (chunk, slot).
fn key_words(
    comptime T: type,
    args: *const encode.PageArgs,
    g: usize,
    inverses: *const [format.page_tokens]f32,
    words: [*]u32,
) void {
    var slot: usize = 0;
    while (slot < format.page_tokens) : (slot += 4) inline for (0..2) |h| {
        var four: [4]@Vector(4, u32) = undefined;
        inline for (&four, 0..) |*word, t| {
            const x = load_group(args.rows, args.dim, slot + t, g)[h];
            const codes = T.encode(x, vec.splat(inverses[slot + t]));
            word.* = @bitCast(@as(@Vector(16, u8), @truncate(codes)));
        }
        const joined = std.simd.join(
            std.simd.join(four[0], four[1]),
            std.simd.join(four[2], four[3]),
        );
        inline for (0..4) |chunk| {
            const of_chunk = [4]i32{ chunk, chunk + 4, chunk + 8, chunk + 12 };
            const target = words + (h * 4 + chunk) * format.page_tokens + slot;
            vec.store(target, @as(@Vector(4, u32), @shuffle(u32, joined, undefined, of_chunk)));
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
        var word: U = @splat(0);
        inline for (0..4) |k| {
            const slot = quad + format.block_slots * k;
            const x = load_group(args.rows, args.dim, slot, g)[h];
            word |= T.encode(x, vec.splat(inverses[slot])) << @splat(8 * k);
        }
        vec.store(words + quad * format.group + h * vec.lanes, word);
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
            const codes: [vec.lanes]u32 = T.encode(part, inverse);
            for (codes, 0..) |code, i| {
                const dim = g * format.group + h * vec.lanes + i;
                T.set(side, base, slot, dim, @truncate(code));
            }
        }
    }
}

/// The offset of a page's keys: about the mean of `count` rows, added in their order. See
/// `k_format.to_offset`.
pub fn store_offsets(rows: [*]const f32, count: usize, dim: usize, offsets: [*]u8) void {
    const share: f32 = 1.0 / @as(f32, @floatFromInt(count));
    var d: usize = 0;
    while (d < dim) : (d += vec.lanes) {
        var total = vec.splat(0);
        for (0..count) |i| total += vec.load(F, rows + i * dim + d);
        vec.store(offsets + d, k_format.to_offset(total * vec.splat(share)));
    }
}

/// Makes rows relative to the offset of their page.
pub fn subtract_offsets(rows: [*]f32, count: usize, dim: usize, offsets: [*]const u8) void {
    var d: usize = 0;
    while (d < dim) : (d += vec.lanes) {
        const offset = k_format.from_offset(vec.load(@Vector(16, u8), offsets + d));
        for (0..count) |i| {
            const at = rows + i * dim + d;
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
