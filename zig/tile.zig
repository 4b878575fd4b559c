//! Many query rows against one window of floating-point keys and values, as in a prefill. Sums are
//! those of score.zig and accumulate.zig, bit by bit; what differs is how much is computed from
//! what a load brings into registers and the nearest cache. Called by block.zig through the kernel
//! table.
const std = @import("std");
const accumulate_file = @import("accumulate.zig");
const format = @import("format.zig");
const score = @import("score.zig");
const vec = @import("vec.zig");
const ahead_file = @import("ahead.zig");
const Ahead = ahead_file.Ahead;
const Spread = ahead_file.Spread;
const AccumulateArgs = accumulate_file.AccumulateArgs;
const F = vec.F;

/// Below this many rows, laying keys out for them costs more than it saves.
pub const rows_min = 17;
/// Query rows whose sums the registers hold, beside `panel_blocks` blocks of 16 tokens.
const tile_rows = if (vec.wide_registers) 8 else vec.sums_max;
const panel_blocks = if (vec.wide_registers) 2 else 1;
/// Callers' buffers of scores have room for a whole number of these.
pub const rows_multiple = 8;

comptime {
    std.debug.assert(rows_multiple % tile_rows == 0);
}

pub const KeysArgs = extern struct {
    /// Rows as stored.
    keys: [*]const u8,
    /// Dimensions as stored.
    dim: usize,
    /// Blocks of 16 slots.
    blocks: usize,
    ahead: Ahead,
    target: [*]align(64) f32,
};

/// Keys as `score_rows` reads them: panels of one or two blocks, each (dimension, slot), with the
/// dimensions in the order in which they are added up.
pub fn lay_out_keys(comptime T: type, args: *const KeysArgs) void {
    var spread = args.ahead.over(args.blocks * (args.dim / vec.lanes));
    var target: [*]f32 = args.target;
    var block: usize = 0;
    while (block + panel_blocks <= args.blocks) : (block += panel_blocks) {
        lay_out_panel(T, panel_blocks, args, block, target, &spread);
        target += panel_blocks * vec.lanes * args.dim;
    }
    while (block < args.blocks) : (block += 1) {
        lay_out_panel(T, 1, args, block, target, &spread);
        target += vec.lanes * args.dim;
    }
}

fn lay_out_panel(
    comptime T: type,
    comptime blocks: usize,
    args: *const KeysArgs,
    first_block: usize,
    target: [*]f32,
    spread: *Spread,
) void {
    @setEvalBranchQuota(10_000); // everything below is unrolled
    const row_bytes = args.dim * @sizeOf(T.Element);
    const chunks = args.dim / vec.lanes;
    inline for (0..blocks) |b| {
        const rows = args.keys + (first_block + b) * vec.lanes * row_bytes;
        for (0..chunks) |chunk| {
            spread.turn();
            var square: [vec.lanes]F = undefined;
            const at = rows + chunk * vec.lanes * @sizeOf(T.Element);
            inline for (&square, 0..) |*row, t| row.* = T.load(at + t * row_bytes);
            inline for (vec.transpose(&square), 0..) |column, lane| {
                const index = (bit_reversed(lane) * chunks + chunk) * blocks + b;
                vec.store(target + index * vec.lanes, column);
            }
        }
    }
}

/// When a lane has its turn, and which lane has a turn: sums of lanes that `vec.reduce` adds first
/// follow each other.
inline fn bit_reversed(index: usize) usize {
    return @bitReverse(@as(u4, @intCast(index)));
}

pub const ScoreArgs = extern struct {
    /// From `lay_out_keys`.
    keys: [*]align(64) const f32,
    blocks: usize,
    /// Dimensions as stored.
    dim: usize,
    /// (row, query_stride)
    query: [*]const f32,
    query_stride: usize,
    rows: usize,
    /// (row, slot): room for a multiple of `rows_multiple` rows.
    scores: [*]align(64) [format.page_tokens]f32,
};

/// Scores of all slots of the blocks.
pub fn score_rows(args: *const ScoreArgs) void {
    var keys: [*]const f32 = args.keys;
    var block: usize = 0;
    while (block + panel_blocks <= args.blocks) : (block += panel_blocks) {
        score_panel(panel_blocks, args, keys, block);
        keys += panel_blocks * vec.lanes * args.dim;
    }
    while (block < args.blocks) : (block += 1) {
        score_panel(1, args, keys, block);
        keys += vec.lanes * args.dim;
    }
}

fn score_panel(
    comptime blocks: usize,
    args: *const ScoreArgs,
    keys: [*]const f32,
    block: usize,
) void {
    var row: usize = 0;
    while (row < args.rows) : (row += tile_rows) {
        var queries: [tile_rows][*]const f32 = undefined;
        // What the last rows are computed again for goes where nothing is read.
        inline for (&queries, 0..) |*query, r| {
            query.* = args.query + @min(row + r, args.rows - 1) * args.query_stride;
        }
        const sums = score_tile(blocks, keys, &queries, args.dim / vec.lanes);
        inline for (sums, 0..) |of_row, r| inline for (of_row, 0..) |sum, b| {
            vec.store(@as([*]f32, &args.scores[row + r]) + (block + b) * vec.lanes, sum);
        };
    }
}

/// Lanes of the key are loop turns here, and lanes of the registers are slots; sums wait for their
/// partners on a stack.
inline fn score_tile(
    comptime blocks: usize,
    keys: [*]const f32,
    queries: *const [tile_rows][*]const f32,
    chunks: usize,
) [tile_rows][blocks]F {
    @setEvalBranchQuota(10_000); // everything below is unrolled
    const Sums = [tile_rows][blocks]F;
    var waiting: [std.math.log2(vec.lanes)]Sums = undefined;
    var depth: usize = 0;
    for (0..vec.lanes) |turn| {
        const lane = bit_reversed(turn);
        const at = keys + turn * chunks * blocks * vec.lanes;
        var sums: Sums = undefined;
        // That these do not begin with an addition to zero shows in the sign of a zero at most.
        add_products(blocks, .first, &sums, at, queries, lane);
        for (1..chunks) |chunk| {
            const next = at + chunk * blocks * vec.lanes;
            add_products(blocks, .next, &sums, next, queries, chunk * vec.lanes + lane);
        }
        for (0..@ctz(~turn)) |_| {
            depth -= 1;
            inline for (&sums, &waiting[depth]) |*of_row, *before| {
                inline for (of_row, before) |*sum, x| sum.* += x;
            }
        }
        waiting[depth] = sums;
        depth += 1;
    }
    return waiting[0];
}

inline fn add_products(
    comptime blocks: usize,
    comptime order: enum { first, next },
    sums: *[tile_rows][blocks]F,
    keys: [*]const f32,
    queries: *const [tile_rows][*]const f32,
    dimension: usize,
) void {
    var slots: [blocks]F = undefined;
    inline for (&slots, 0..) |*some, b| some.* = vec.load(F, keys + b * vec.lanes);
    inline for (sums, queries) |*of_row, query| {
        inline for (of_row, slots) |*sum, some| {
            const product = vec.times(some, query, dimension);
            sum.* = if (order == .first) product else sum.* + product;
        }
    }
}

pub const ValuesArgs = extern struct {
    /// Up to four rows each, all with the same f32 values.
    blocks: [*]const AccumulateArgs,
    /// (block): its rows.
    rows: [*]const usize,
    count: usize,
};

/// Some dimensions for all rows, then others: their values stay in the nearest cache.
pub fn accumulate_rows(args: *const ValuesArgs) void {
    const chunks = args.blocks[0].dim / vec.lanes;
    const flight = comptime accumulate_file.float_flight(score.rows_max);
    var chunk: usize = 0;
    while (chunk + flight <= chunks) : (chunk += flight) accumulate_chunks(flight, args, chunk);
    while (chunk < chunks) : (chunk += 1) accumulate_chunks(1, args, chunk);
}

fn accumulate_chunks(comptime flight: usize, args: *const ValuesArgs, chunk: usize) void {
    for (args.blocks[0..args.count], args.rows) |*block, rows| {
        const slots = block.end_slot - block.first_slot;
        var spread = block.ahead.part(chunk, flight, block.dim / vec.lanes).over(slots);
        switch (rows) {
            inline 1...score.rows_max => |n| accumulate_file.accumulate_float(
                format.F32,
                n,
                flight,
                block,
                chunk,
                &spread,
            ),
            else => unreachable, // block.zig
        }
    }
}

test "many rows have the bits of few" {
    const dim = 80;
    const stride = 96;
    const rows = 13;
    var prng = std.Random.DefaultPrng.init(6);
    var keys: [format.page_tokens * dim]u16 = undefined; // f16
    var query: [rows * stride]f32 = undefined;
    for (&keys) |*x| x.* = @bitCast(@as(f16, @floatCast(prng.random().floatNorm(f32))));
    for (&query) |*x| x.* = prng.random().floatNorm(f32);
    inline for (.{ 1, 3, 4 }) |blocks| {
        var laid_out: [format.page_tokens * dim]f32 align(64) = undefined;
        lay_out_keys(format.F16, &.{
            .keys = @ptrCast(&keys),
            .dim = dim,
            .blocks = blocks,
            .ahead = .none,
            .target = &laid_out,
        });
        var scores: [16][format.page_tokens]f32 align(64) = undefined;
        score_rows(&.{
            .keys = &laid_out,
            .blocks = blocks,
            .dim = dim,
            .query = &query,
            .query_stride = stride,
            .rows = rows,
            .scores = &scores,
        });
        const slots = blocks * vec.lanes;
        for (scores[0..rows], 0..) |of_row, r| for (of_row[0..slots], 0..) |sum, slot| {
            var lanes = vec.splat(0);
            for (0..dim / vec.lanes) |chunk| {
                const key = vec.load(@Vector(16, u16), keys[slot * dim + chunk * vec.lanes ..].ptr);
                const x = vec.load(F, query[r * stride + chunk * vec.lanes ..].ptr);
                lanes += vec.from_f16(vec.lanes, key) * x;
            }
            try std.testing.expectEqual(vec.reduce(.add, lanes), sum);
        };
    }
}
