//! The key side of attention: logits of up to four query rows against the keys of a page, read as
//! they are packed. Called by step.zig through the kernel table.
const std = @import("std");
const dot = @import("dot.zig");
const vec = @import("vec.zig");
const format = @import("format.zig");
const k_format = @import("k_format.zig");
const prepare = @import("prepare.zig");
const ahead_file = @import("ahead.zig");
const Ahead = ahead_file.Ahead;
const Spread = ahead_file.Spread;
const F = vec.F;

/// Query rows computed from one load of a page.
pub const rows_max = 4;
/// Scores, and later weights, of a block of rows against the slots of a page.
pub const Scores = [rows_max][format.page_tokens]f32;

pub const ScoreArgs = extern struct {
    keys: [*]const u8,
    /// The keys are relative to offsets, which lie behind their scales.
    centred: bool,
    ahead: Ahead,
    /// Dimensions as stored.
    dim: usize,
    query: *const prepare.Query,
    /// First query row of the block.
    row: usize,
    /// Slots to compute; a few more on either side may be.
    first_slot: usize,
    end_slot: usize,
    scores: *align(64) Scores,
};

pub fn score(comptime T: type, comptime rows: usize, args: *const ScoreArgs) void {
    if (T.quantized) score_integer(T, rows, args) else score_float(T, rows, args);
}

/// Dot products along the dimension, 16 lanes wide. As many tokens at a time as there is room for
/// sums, which are then reduced together, if need be with those of other tokens.
fn score_float(comptime T: type, comptime rows: usize, args: *const ScoreArgs) void {
    const tokens = comptime std.math.floorPowerOfTwo(usize, @max(1, vec.sums_max / rows));
    const together = if (vec.wide_registers) format.block_slots else tokens;
    const chunks = args.dim / vec.lanes;
    var slot = args.first_slot / tokens * tokens;
    const end = std.mem.alignForward(usize, args.end_slot, tokens);
    var spread = args.ahead.over((end - slot) / tokens * chunks);
    const row_bytes = args.dim * @sizeOf(T.Element);
    var at = args.keys + slot * row_bytes;
    var keys = load_keys(T, tokens, at, row_bytes);
    var sums: [rows][together]F = undefined;
    while (slot < end) {
        const first = slot / together * together;
        while (slot < @min(end, first + together)) : (slot += tokens) {
            const next = if (slot + tokens < end) at + tokens * row_bytes else at;
            const some = dot_float(T, rows, tokens, args, at, next, &keys, &spread);
            inline for (&sums, some) |*of_row, some_of_row| {
                of_row[slot - first ..][0..tokens].* = some_of_row;
            }
            at = next;
        }
        if (vec.wide_registers) {
            inline for (args.scores[0..rows], &sums) |*scores, *of_row| {
                vec.store(@as([*]f32, scores) + first, vec.fold_each(.add, F, together, of_row));
            }
        } else {
            const scores: [rows][tokens]f32 =
                @bitCast(vec.fold_each(.add, F, rows * tokens, @ptrCast(&sums)));
            inline for (args.scores[0..rows], scores) |*of_row, some| {
                of_row[first..][0..tokens].* = some;
            }
        }
    }
}

/// A chunk of each token.
inline fn load_keys(
    comptime T: type,
    comptime tokens: usize,
    at: [*]const u8,
    row_bytes: usize,
) [tokens]F {
    var keys: [tokens]F = undefined;
    inline for (&keys, 0..) |*key, t| key.* = vec.early(T.load(at + t * row_bytes));
    return keys;
}

/// Sums of all tokens at `at` and all rows. `keys` has the first chunk of each; afterwards that of
/// the tokens at `next`.
inline fn dot_float(
    comptime T: type,
    comptime rows: usize,
    comptime tokens: usize,
    args: *const ScoreArgs,
    at: [*]const u8,
    next: [*]const u8,
    keys: *[tokens]F,
    spread: *Spread,
) [rows][tokens]F {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const q = args.query;
    const row_bytes = args.dim * @sizeOf(T.Element);
    const chunk_bytes = vec.lanes * @sizeOf(T.Element);
    const chunks = args.dim / vec.lanes;
    var sums: [rows][tokens]F = @splat(@splat(vec.splat(0)));
    for (0..chunks) |chunk| {
        spread.turn();
        const here = at + chunk * chunk_bytes;
        if (!vec.converts_early) keys.* = load_keys(T, tokens, here, row_bytes);
        const used = keys.*;
        if (vec.converts_early) {
            const after = if (chunk + 1 < chunks) here + chunk_bytes else next;
            keys.* = load_keys(T, tokens, after, row_bytes);
        }
        inline for (&sums, 0..) |*of_row, r| {
            const x = vec.load(F, q.values + (args.row + r) * q.dim + chunk * vec.lanes);
            inline for (of_row, used) |*sum, key| sum.* += key * x;
        }
    }
    return sums;
}

/// Exact integer dot products of a group for 16 slots at a time, then one multiplication by the
/// scales of key and query; groups are added in order. As many rows at a time as there is room for.
fn score_integer(comptime T: type, comptime rows: usize, args: *const ScoreArgs) void {
    const planes = T.query_planes;
    // Blocks in flight: as many as the registers hold.
    const flight = if (vec.wide_registers) format.blocks_per_page / planes else 1;
    const together: usize = comptime @min(rows, @max(1, dot.accumulators_max / planes / flight));
    const passes = comptime std.math.divCeil(usize, rows, together) catch unreachable;
    const loads = args.query.groups() * T.loads_per_group(.key);
    const first_block = args.first_slot / format.block_slots;
    const end_block = (args.end_slot - 1) / format.block_slots + 1;
    const blocks = end_block - first_block;
    var spread = args.ahead.over(loads * passes * (blocks / flight + blocks % flight));
    const starts = score_offsets(T, rows, args);
    var block = first_block;
    while (block + flight <= end_block) : (block += flight) {
        inline for (0..passes) |pass| {
            const count = comptime @min(together, rows - pass * together);
            const some = starts[pass * together ..][0..count];
            score_blocks(T, pass * together, count, flight, args, some, block, &spread);
        }
    }
    while (block < end_block) : (block += 1) {
        inline for (0..passes) |pass| {
            const count = comptime @min(together, rows - pass * together);
            const some = starts[pass * together ..][0..count];
            score_blocks(T, pass * together, count, 1, args, some, block, &spread);
        }
    }
}

/// What the offsets of a page add to the scores of all its slots.
inline fn score_offsets(comptime T: type, comptime rows: usize, args: *const ScoreArgs) [rows]f32 {
    if (!T.half_levels or !args.centred) return @splat(0);
    const q = args.query;
    const offsets = args.keys + q.groups() * (T.group_bytes + format.page_tokens);
    var sums: [rows]F = @splat(vec.splat(0));
    for (0..q.dim / vec.lanes) |i| {
        const at = i * vec.lanes;
        const offset = k_format.from_offset(vec.load(@Vector(16, u8), offsets + at));
        inline for (&sums, 0..) |*sum, r| {
            sum.* += offset * vec.load(F, q.values + (args.row + r) * q.dim + at);
        }
    }
    return vec.fold_each(.add, F, rows, &sums);
}

fn score_blocks(
    comptime T: type,
    comptime first_row: usize,
    comptime rows: usize,
    comptime blocks: usize,
    args: *const ScoreArgs,
    starts: *const [rows]f32,
    block: usize,
    spread: *Spread,
) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const planes = T.query_planes;
    const bias = if (T.bits == 8) dot.code_bias else T.offset;
    const loads = T.loads_per_group(.key);
    const q = args.query;
    const row = args.row + first_row;
    const words = q.dim / 4;
    const groups = q.groups();
    const scales = args.keys + groups * T.group_bytes;
    var totals: [rows][blocks]F = undefined;
    inline for (&totals, starts) |*total, start| total.* = @splat(vec.splat(start));
    for (0..groups) |g| {
        var sums: [planes][rows][blocks]dot.Accumulator = undefined;
        inline for (0..rows) |r| {
            const sum = q.sums[(row + r) * groups + g];
            const start = if (T.half_levels) 0 else -bias *% sum;
            inline for (0..blocks) |b| {
                sums[planes - 1][r][b] = .init(start);
                if (planes == 2) sums[0][r][b] = .init(0);
            }
        }
        for (0..loads) |l| {
            const of_group = args.keys + g * T.group_bytes;
            spread.turn();
            var codes: [blocks]T.Loaded = undefined;
            inline for (&codes, 0..) |*some, b| some.* = .init(.key, of_group, l, (block + b) * 64);
            inline for (0..T.chunks_per_load) |chunk| {
                const word = g * format.group / 4 + l * T.chunks_per_load + chunk;
                inline for (0..rows) |r| inline for (0..planes) |p| {
                    const y = q.planes[((row + r) * 2 + p) * words + word];
                    inline for (0..blocks) |b| sums[p][r][b].dot(codes[b].select(chunk), y);
                };
            }
        }
        inline for (0..blocks) |b| {
            const at = g * format.page_tokens + (block + b) * 16;
            const key_scale = T.load_scales(scales, at);
            inline for (0..rows) |r| {
                var sum = sums[0][r][b].get();
                if (planes == 2) sum = (sum << @splat(7)) +% sums[1][r][b].get();
                const of_row = (row + r) * groups + g;
                if (T.half_levels) {
                    const biases: vec.I = @splat(bias *% q.sums[of_row]);
                    sum = (sum << @splat(1)) -% biases;
                }
                const halved: f32 = if (T.half_levels) 0.5 else 1;
                const unit = key_scale * vec.splat(q.scales[of_row] * halved);
                totals[r][b] += @as(F, @floatFromInt(sum)) * unit;
            }
        }
    }
    inline for (0..rows) |r| inline for (0..blocks) |b| {
        vec.store(@as([*]f32, &args.scores[first_row + r]) + (block + b) * 16, totals[r][b]);
    };
}
