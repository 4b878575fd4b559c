//! The key side of attention: logits of up to four query rows against the keys of a page, read as
//! they are packed. Called by step.zig through the kernel table.
const std = @import("std");
const dot = @import("dot.zig");
const vec = @import("vec.zig");
const format = @import("format.zig");
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
/// sums, which are then reduced together.
fn score_float(comptime T: type, comptime rows: usize, args: *const ScoreArgs) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const tokens = comptime std.math.floorPowerOfTwo(usize, @max(1, vec.sums_max / rows));
    const chunk_bytes = vec.lanes * @sizeOf(T.Element);
    const chunks = args.dim / vec.lanes;
    const q = args.query;
    var slot = args.first_slot / tokens * tokens;
    const end = std.mem.alignForward(usize, args.end_slot, tokens);
    var spread = args.ahead.over((end - slot) / tokens * chunks);
    while (slot < end) : (slot += tokens) {
        var sums: [rows * tokens]F = @splat(vec.splat(0));
        for (0..chunks) |chunk| {
            spread.turn();
            var keys: [tokens]F = undefined;
            inline for (0..tokens) |t| {
                const at = ((slot + t) * chunks + chunk) * chunk_bytes;
                keys[t] = T.load(args.keys + at);
            }
            inline for (0..rows) |r| {
                const x = vec.load(F, q.values + (args.row + r) * q.dim + chunk * vec.lanes);
                inline for (0..tokens) |t| sums[r * tokens + t] += keys[t] * x;
            }
        }
        const scores: [rows * tokens]f32 = vec.fold_each(.add, F, rows * tokens, &sums);
        inline for (0..rows) |r| {
            @memcpy(args.scores[r][slot..][0..tokens], scores[r * tokens ..][0..tokens]);
        }
    }
}

/// Exact integer dot products of a group for 16 slots at a time, then one multiplication by the
/// scales of key and query; groups are added in order. As many rows at a time as there is room for.
fn score_integer(comptime T: type, comptime rows: usize, args: *const ScoreArgs) void {
    const planes = T.query_planes;
    // Blocks in flight: as many as the registers hold.
    const flight = if (vec.wide_registers) format.blocks_per_page / planes else 1;
    const together: usize = comptime @min(rows, @max(1, dot.accumulators_max / planes / flight));
    const passes = comptime std.math.divCeil(usize, rows, together) catch unreachable;
    const loads = args.query.groups() * loads_per_group(T);
    const first_block = args.first_slot / format.block_slots;
    const end_block = (args.end_slot - 1) / format.block_slots + 1;
    const blocks = end_block - first_block;
    var spread = args.ahead.over(loads * passes * (blocks / flight + blocks % flight));
    var block = first_block;
    while (block + flight <= end_block) : (block += flight) {
        inline for (0..passes) |pass| {
            const count = comptime @min(together, rows - pass * together);
            score_blocks(T, pass * together, count, flight, args, block, &spread);
        }
    }
    while (block < end_block) : (block += 1) {
        inline for (0..passes) |pass| {
            const count = comptime @min(together, rows - pass * together);
            score_blocks(T, pass * together, count, 1, args, block, &spread);
        }
    }
}

fn loads_per_group(comptime T: type) usize {
    return format.group / 4 / T.chunks_per_load;
}

fn score_blocks(
    comptime T: type,
    comptime first_row: usize,
    comptime rows: usize,
    comptime blocks: usize,
    args: *const ScoreArgs,
    block: usize,
    spread: *Spread,
) void {
    @setEvalBranchQuota(100_000); // everything below is unrolled
    const planes = T.query_planes;
    const bias = if (T.bits == 8) dot.code_bias else T.offset;
    const loads = loads_per_group(T);
    const q = args.query;
    const row = args.row + first_row;
    const words = q.dim / 4;
    const groups = q.groups();
    const run_bytes = format.page_tokens * 4; // one word of every slot
    const scales: [*]const f16 = @ptrCast(@alignCast(args.keys + groups * loads * run_bytes));
    var totals: [rows][blocks]F = @splat(@splat(vec.splat(0)));
    for (0..groups) |g| {
        var sums: [planes][rows][blocks]dot.Accumulator = undefined;
        inline for (0..rows) |r| {
            const start = -bias *% q.sums[(row + r) * groups + g];
            inline for (0..blocks) |b| {
                sums[planes - 1][r][b] = .init(start);
                if (planes == 2) sums[0][r][b] = .init(0);
            }
        }
        for (0..loads) |l| {
            const run = (g * loads + l) * run_bytes + block * 64;
            spread.turn();
            var codes: [blocks]dot.Codes = undefined;
            inline for (0..blocks) |b| codes[b] = load_codes(T, args.keys + run + b * 64);
            inline for (0..T.chunks_per_load) |chunk| {
                const word = g * format.group / 4 + l * T.chunks_per_load + chunk;
                inline for (0..rows) |r| inline for (0..planes) |p| {
                    const y = q.planes[((row + r) * 2 + p) * words + word];
                    inline for (0..blocks) |b| sums[p][r][b].dot(
                        select_nibbles(T, codes[b], chunk),
                        y,
                    );
                };
            }
        }
        inline for (0..blocks) |b| {
            const at = g * format.page_tokens + (block + b) * 16;
            const key_scale = vec.from_f16(16, vec.load(@Vector(16, f16), scales + at));
            inline for (0..rows) |r| {
                var sum = sums[0][r][b].get();
                if (planes == 2) sum = (sum << @splat(7)) +% sums[1][r][b].get();
                const unit = key_scale * vec.splat(q.scales[(row + r) * groups + g]);
                totals[r][b] += @as(F, @floatFromInt(sum)) * unit;
            }
        }
    }
    inline for (0..rows) |r| inline for (0..blocks) |b| {
        vec.store(@as([*]f32, &args.scores[first_row + r]) + (block + b) * 16, totals[r][b]);
    };
}

pub inline fn load_codes(comptime T: type, source: [*]const u8) dot.Codes {
    return if (T.bits == 8) dot.load_signed_codes(source) else vec.load(dot.Codes, source);
}

/// The codes of chunk (or token quad) `which` of a load.
pub inline fn select_nibbles(comptime T: type, codes: dot.Codes, comptime which: usize) dot.Codes {
    if (T.bits == 8) return codes;
    return if (which == 0) dot.low_nibbles(codes) else dot.high_nibbles(codes);
}
