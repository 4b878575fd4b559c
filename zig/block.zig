//! Up to 64 query rows against one window, kernel by kernel: each goes over all rows before the
//! next one begins, so that what it reads stays in the nearest cache. Called by attend.zig; calls
//! step.zig and the kernels for many rows.
const std = @import("std");
const accumulate_file = @import("accumulate.zig");
const attend = @import("attend.zig");
const format = @import("format.zig");
const score = @import("score.zig");
const tile = @import("tile.zig");
const tile_values = @import("tile_values.zig");
const vec = @import("vec.zig");
const State = @import("state.zig").State;
const Step = @import("step.zig").Step;
const Tier = @import("tier.zig").Tier;
const Window = @import("window.zig").Window;

pub const rows_max = 64;
const steps_max = rows_max / score.rows_max;

comptime {
    std.debug.assert(rows_max % tile.rows_multiple == 0);
    std.debug.assert(steps_max <= tile_values.blocks_max);
}

pub const Block = struct {
    work: *attend.Work,
    tier: *const Tier,
    window: *const Window,
    row: usize,
    rows: usize,
    /// Those that see anything.
    steps: [steps_max]Step,
    count: usize,
    scores: [rows_max][format.page_tokens]f32 align(64),

    /// The rows from `row` on, in place: a block is large.
    pub fn start(
        block: *Block,
        work: *attend.Work,
        tier: *const Tier,
        unit: attend.Unit,
        window: *const Window,
        row: usize,
    ) void {
        block.work = work;
        block.tier = tier;
        block.window = window;
        block.row = row;
        block.rows = @min(rows_max, work.rows - row);
        block.count = 0;
        var first: usize = 0;
        while (first < block.rows) : (first += score.rows_max) {
            const rows = @min(score.rows_max, block.rows - first);
            const scores = block.scores[first..][0..score.rows_max];
            const step = &block.steps[block.count];
            step.start(work, tier, unit, window, row + first, rows, scores);
            block.count += @intFromBool(step.any_seen());
        }
    }

    pub fn accumulate(block: *Block, state: State) void {
        if (block.count == 0) return;
        block.compute_logits();
        if (block.window.codes_for_many) |codes| return block.accumulate_packed(state, codes);
        for (block.steps[0..block.count]) |*step| step.update(state);
        if (block.window.values_for_many == null) {
            for (block.steps[0..block.count]) |*step| step.accumulate(state);
            return;
        }
        var args: [steps_max]accumulate_file.AccumulateArgs = undefined;
        var rows: [steps_max]usize = undefined;
        for (block.steps[0..block.count], 0..) |*step, i| {
            args[i] = step.accumulate_args(state, 0);
            rows[i] = step.count;
        }
        block.work.job.table.accumulate_rows(&.{
            .blocks = &args,
            .rows = &rows,
            .count = block.count,
        });
    }

    /// Quantized values: rows that see the whole window follow one another, and go together.
    fn accumulate_packed(block: *Block, state: State, codes: [*]const u8) void {
        const steps = block.steps[0..block.count];
        var together: []Step = steps[0..0];
        for (steps, 0..) |*step, i| {
            if (step.sees_all()) {
                if (together.len == 0) together = steps[i..];
                together.len = i + 1 - (together.ptr - steps.ptr);
                continue;
            }
            step.update(state);
            step.accumulate(state);
        }
        if (together.len == 0) return;
        const row = together[0].row;
        const half = &block.tier.value;
        block.work.job.table.accumulate_packed[@backingInt(half.format)].?(&.{
            .values = block.window.values,
            .codes = codes,
            .dim = half.dim_stored(),
            .ahead_of_update = together[0].ahead(block.window.ahead_of_update),
            .ahead = together[0].ahead(block.window.ahead_of_accumulate),
            .count = together.len,
            .scores = block.scores[row - block.row ..].ptr,
            .running = .{
                .top = state.top.ptr + row,
                .sums = state.sums.ptr + row * vec.lanes,
            },
            .outputs = state.outputs.ptr + row * state.dim,
            .output_stride = state.dim,
        });
    }

    pub fn add_mass(block: *Block, top: []const f32, totals: []const f32) void {
        block.compute_logits();
        for (block.steps[0..block.count]) |*step| {
            step.add_mass(top[step.row..], totals[step.row..]);
        }
    }

    fn compute_logits(block: *Block) void {
        const steps = block.steps[0..block.count];
        if (block.window.keys_for_many) |keys| {
            const query = &block.work.query;
            block.work.job.table.score_rows(&.{
                .keys = keys,
                .blocks = block.window.blocks(),
                .dim = block.tier.key.dim_stored(),
                .query = query.values + block.row * query.dim,
                .query_stride = query.dim,
                .rows = block.rows,
                .scores = &block.scores,
            });
        } else for (steps) |*step| step.score_keys();
        for (steps) |*step| step.make_logits();
    }
};
