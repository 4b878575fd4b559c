//! Attention over a cache. Work is cut into units (a tier's tokens within one chunk of positions) and
//! blocks of query rows, always in the same way; a unit's result depends on its tokens alone, and units
//! merge in the order of positions. So a query gives the same bits alone or in a batch, on one thread
//! or many. Called by abi.zig; calls the kernel table, state.zig, threads.zig.
const std = @import("std");
const abi = @import("abi.zig");
const accumulate = @import("accumulate.zig");
const cache_file = @import("cache.zig");
const dispatch = @import("dispatch.zig");
const format = @import("format.zig");
const kernels = @import("kernels.zig");
const message = @import("message.zig");
const prepare = @import("prepare.zig");
const score = @import("score.zig");
const scratch = @import("scratch.zig");
const softmax = @import("softmax.zig");
const threads = @import("threads.zig");
const vec = @import("vec.zig");
const Cache = cache_file.Cache;
const State = @import("state.zig").State;
const Tier = @import("tier.zig").Tier;

/// Positions of a chunk: small enough to share among threads, large enough that merging costs nothing.
const chunk_tokens = 2048;
/// Query rows that one task works on while a page is in the nearest cache.
const task_rows = 64;
/// Below this many bytes of pages, waking other threads costs more than it gains.
const parallel_bytes_min = 256 * 1024;

pub const Request = struct {
    query: [*]const f32, // (query_tokens, query_heads, head_dim)
    query_tokens: usize,
    query_heads: usize,
    scale: f32,
    options: abi.AttendOptions,
    mask_kind: abi.MaskKind,
    out: [*]f32, // (query_tokens, query_heads, value_dim)
};

/// Attends, or says why not and leaves the outputs alone.
pub fn attend(cache: *Cache, request: *const Request) error{ InvalidArgument, OutOfMemory, NotFinite }!void {
    const config = &cache.config;
    if (request.query_heads == 0 or request.query_heads % config.num_kv_heads != 0) {
        message.set("query has {d} heads; expected a multiple of the cache's {d} kv heads", .{
            request.query_heads, config.num_kv_heads,
        });
        return error.InvalidArgument;
    }
    const query_values = request.query_tokens * request.query_heads * config.head_dim;
    for (request.query[0..query_values], 0..) |x, i| {
        if (std.math.isFinite(x)) continue;
        message.set("query: value {d} is {d}; expected finite values", .{ i, x });
        return error.NotFinite;
    }
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    if (request.query_tokens > cache.next and cache.next > 0) {
        message.set("query has {d} tokens; the cache has seen only {d}", .{ request.query_tokens, cache.next });
        return error.InvalidArgument;
    }
    const options = &request.options;
    if ((request.mask_kind != .none or options.mass != null) and options.live_tokens != cache.len()) {
        message.set("mask or mass is for {d} tokens; the cache holds {d}", .{ options.live_tokens, cache.len() });
        return error.InvalidArgument;
    }
    if (request.query_tokens == 0) return;
    var job: Job = try .init(cache, request);
    defer job.deinit();
    job.run();
}

const Unit = struct { tier: usize, start: u64, end: u64 };

/// One call of `attend`.
const Job = struct {
    cache: *Cache,
    request: *const Request,
    table: *const kernels.Table,
    /// Query heads per kv head.
    ratio: usize,
    /// Queries whose rows make a task.
    block_queries: usize,
    blocks: usize,
    rows_max: usize,
    units: usize,
    /// Whether units are tasks of their own, merged afterwards.
    split: bool,
    memory: []align(64) f32,
    lanes: scratch.Lanes,
    /// With `split`: (kv head, block, unit) states.
    partials: []align(64) f32,

    fn init(cache: *Cache, request: *const Request) error{OutOfMemory}!Job {
        const config = &cache.config;
        const ratio = request.query_heads / config.num_kv_heads;
        const block_queries = @max(1, task_rows / ratio);
        var job: Job = .{
            .cache = cache,
            .request = request,
            .table = dispatch.table(),
            .ratio = ratio,
            .block_queries = block_queries,
            .blocks = (request.query_tokens + block_queries - 1) / block_queries,
            .rows_max = @min(block_queries, request.query_tokens) * ratio,
            .units = 0,
            .split = false,
            .memory = undefined,
            .lanes = undefined,
            .partials = &.{},
        };
        var bytes: usize = 0;
        for (&cache.tiers) |*tier| {
            job.units += unit_count(tier);
            bytes += tier.page_count() * tier.page_bytes();
        }
        const workers = if (bytes * job.blocks < parallel_bytes_min) 1 else @min(threads.thread_count(), scratch.Lanes.count_max);
        const tasks = config.num_kv_heads * job.blocks;
        job.split = workers > 1 and tasks < 4 * workers and job.units > 1;
        const lanes: usize = @min(workers, if (job.split) tasks * job.units else tasks);
        const lane_size = job.lane_floats();
        const partial_floats = if (job.split) tasks * job.units * State.floats(job.rows_max, job.value_dim()) else 0;
        job.memory = try scratch.acquire(lanes * lane_size + partial_floats);
        job.lanes = .init(job.memory[0 .. lanes * lane_size], lanes);
        job.partials = @alignCast(job.memory[lanes * lane_size ..]);
        return job;
    }

    fn deinit(job: *Job) void {
        scratch.release(job.memory);
    }

    fn value_dim(job: *const Job) usize {
        return std.mem.alignForward(usize, job.cache.config.value_dim, format.group);
    }

    fn key_dim(job: *const Job) usize {
        return std.mem.alignForward(usize, job.cache.config.head_dim, format.group);
    }

    /// f32 values that a task works in: a prepared query and three states.
    fn lane_floats(job: *const Job) usize {
        const dim = job.key_dim();
        const groups = dim / format.group;
        const query = job.rows_max * (dim + 2 * dim / 4 + 2 * std.mem.alignForward(usize, groups, vec.lanes));
        return std.mem.alignForward(usize, query, vec.lanes) + 3 * State.floats(job.rows_max, job.value_dim());
    }

    fn run(job: *Job) void {
        const heads = job.cache.config.num_kv_heads;
        const tasks: u32 = @intCast(heads * job.blocks);
        const parallel = job.lanes.count > 1;
        if (job.split) {
            threads.run(tasks * @as(u32, @intCast(job.units)), job, unit_task);
            for (0..tasks) |task| job.merge_partials(task);
        } else if (parallel) {
            threads.run(tasks, job, block_task);
        } else for (0..tasks) |task| block_task(job, @intCast(task));
        if (job.request.options.mass != null) job.run_mass();
    }

    /// A unit's share of one block, kept for `merge_partials`.
    fn unit_task(context: *anyopaque, index: u32) void {
        const job: *Job = @ptrCast(@alignCast(context));
        const unit = job.unit_at(index % job.units);
        const lane = job.lanes.take();
        defer job.lanes.give(lane);
        var work: Work = .init(job, index / job.units, job.lanes.memory(lane));
        work.prepare_rows(&job.cache.tiers[unit.tier]);
        work.run_unit(unit, job.partial(index));
    }

    fn partial(job: *const Job, index: usize) State {
        const size = State.floats(job.rows_max, job.value_dim());
        var memory: []align(64) f32 = @alignCast(job.partials[index * size ..][0..size]);
        return State.carve(&memory, job.rows_max, job.value_dim());
    }

    fn merge_partials(job: *Job, task: usize) void {
        const lane = job.lanes.take();
        defer job.lanes.give(lane);
        var work: Work = .init(job, task, job.lanes.memory(lane));
        work.fold(.kept);
    }

    fn block_task(context: *anyopaque, index: u32) void {
        const job: *Job = @ptrCast(@alignCast(context));
        const lane = job.lanes.take();
        defer job.lanes.give(lane);
        var work: Work = .init(job, index, job.lanes.memory(lane));
        work.fold(.computed);
    }

    fn unit_at(job: *const Job, index: usize) Unit {
        var rest = index;
        for (&job.cache.tiers, 0..) |*tier, t| {
            const units = unit_count(tier);
            if (rest >= units) {
                rest -= units;
                continue;
            }
            const chunk = tier.start / chunk_tokens + rest;
            return .{
                .tier = t,
                .start = @max(tier.start, chunk * chunk_tokens),
                .end = @min(tier.end, (chunk + 1) * chunk_tokens),
            };
        }
        unreachable;
    }

    /// The probabilities of all tokens, in a second pass: one kv head after the other, its queries in
    /// order, so that every sum has a fixed order.
    fn run_mass(job: *Job) void {
        const live: usize = @intCast(job.cache.len());
        const mass: [*]f32 = @ptrCast(@alignCast(job.request.options.mass.?));
        @memset(mass[0 .. job.request.query_heads * live], 0);
        for (0..job.cache.config.num_kv_heads * job.blocks) |task| {
            const lane = job.lanes.take();
            defer job.lanes.give(lane);
            var work: Work = .init(job, task, job.lanes.memory(lane));
            work.fold(.computed);
            work.mass = mass;
            work.fold_mass();
        }
    }
};

fn unit_count(tier: *const Tier) usize {
    if (tier.start == tier.end) return 0;
    return @intCast((tier.end - 1) / chunk_tokens - tier.start / chunk_tokens + 1);
}

/// One block of query rows of one kv head. Row r is query `first_query + r / ratio`, head `r % ratio` of
/// the kv head's query heads.
const Work = struct {
    job: *Job,
    head: usize,
    block: usize,
    first_query: usize,
    rows: usize,
    query: prepare.Query,
    unit_state: State,
    tier_state: State,
    total: State,
    mass: ?[*]f32 = null,

    fn init(job: *Job, task: usize, lane: []align(64) f32) Work {
        const block = task % job.blocks;
        const first_query = block * job.block_queries;
        const queries = @min(job.block_queries, job.request.query_tokens - first_query);
        const rows = queries * job.ratio;
        const dim = job.key_dim();
        const groups = std.mem.alignForward(usize, dim / format.group, vec.lanes);
        var memory = lane;
        const states = [3]State{
            State.carve(&memory, job.rows_max, job.value_dim()).first_rows(rows),
            State.carve(&memory, job.rows_max, job.value_dim()).first_rows(rows),
            State.carve(&memory, job.rows_max, job.value_dim()).first_rows(rows),
        };
        const values = memory[0 .. job.rows_max * dim];
        const planes = memory[values.len..][0 .. job.rows_max * dim / 2];
        const scales = memory[values.len + planes.len ..][0 .. job.rows_max * groups];
        const sums = memory[values.len + planes.len + scales.len ..][0 .. job.rows_max * groups];
        return .{
            .job = job,
            .head = task / job.blocks,
            .block = block,
            .first_query = first_query,
            .rows = rows,
            .query = .{
                .dim = dim,
                .values = values.ptr,
                .planes = @ptrCast(planes.ptr),
                .scales = scales.ptr,
                .sums = @ptrCast(sums.ptr),
            },
            .unit_state = states[0],
            .tier_state = states[1],
            .total = states[2],
        };
    }

    /// Merges all units in order, tier by tier, and writes the outputs.
    fn fold(work: *Work, units: enum { kept, computed }) void {
        const job = work.job;
        work.total.reset();
        var index: usize = 0;
        for (&job.cache.tiers) |*tier| {
            const count = unit_count(tier);
            if (count == 0) continue;
            work.tier_state.reset();
            if (units == .computed) work.prepare_rows(tier);
            for (0..count) |_| {
                switch (units) {
                    .kept => {
                        const task = work.head * job.blocks + work.block;
                        const kept = job.partial(task * job.units + index);
                        work.tier_state.merge(kept.first_rows(work.rows));
                    },
                    .computed => {
                        work.run_unit(job.unit_at(index), work.unit_state);
                        work.tier_state.merge(work.unit_state);
                    },
                }
                index += 1;
            }
            if (tier.value.rotated) for (0..work.rows) |r| {
                job.table.rotate(work.tier_state.outputs.ptr + r * work.tier_state.dim, tier.value.dim_stored());
            };
            work.total.merge(work.tier_state);
        }
        work.finish();
    }

    fn query_of(work: *const Work, row: usize) usize {
        return work.first_query + row / work.job.ratio;
    }

    fn query_head_of(work: *const Work, row: usize) usize {
        return work.head * work.job.ratio + row % work.job.ratio;
    }

    fn query_position(work: *const Work, row: usize) u64 {
        return work.job.cache.next -| work.job.request.query_tokens + work.query_of(row);
    }

    /// Positions that a row may see: [start, end).
    fn visible(work: *const Work, row: usize) struct { start: u64, end: u64 } {
        const options = &work.job.request.options;
        const position = work.query_position(row);
        return .{
            .start = if (options.window == 0) 0 else (position + 1) -| options.window,
            .end = if (options.causal != 0) position + 1 else work.job.cache.next,
        };
    }

    fn prepare_rows(work: *Work, tier: *const Tier) void {
        const request = work.job.request;
        const dim = work.job.cache.config.head_dim;
        const softcap = request.options.softcap;
        const factor = if (softcap == 0) request.scale * softmax.log2_e else request.scale * 2 * softmax.log2_e / softcap;
        for (0..work.rows) |r| {
            const row = work.query_of(r) * request.query_heads + work.query_head_of(r);
            work.job.table.prepare[@backingInt(tier.key.format)](&.{
                .source = request.query + row * dim,
                .source_dim = dim,
                .factor = factor,
                .rotated = tier.key.rotated,
                .row = r,
                .query = &work.query,
            });
        }
    }

    /// Positions that any row of the block may see within a unit.
    fn seen(work: *const Work, unit: Unit) struct { start: u64, end: u64 } {
        const first = work.visible(0);
        const last = work.visible(work.rows - 1); // later queries see later positions
        return .{ .start = @max(unit.start, first.start), .end = @min(unit.end, last.end) };
    }

    fn run_unit(work: *Work, unit: Unit, state: State) void {
        const tier = &work.job.cache.tiers[unit.tier];
        const mine = state.first_rows(work.rows);
        mine.reset();
        const range = work.seen(unit);
        var position = range.start;
        while (position < range.end) {
            const window: Window = .init(tier, position, range.end, work.head);
            var row: usize = 0;
            while (row < work.rows) {
                const count = row_count(work.rows - row);
                var step: Step = .init(work, tier, unit, &window, row, count);
                if (step.any_seen()) step.accumulate(mine);
                row += count;
            }
            position = window.end;
        }
    }

    fn fold_mass(work: *Work) void {
        const totals = work.unit_state.top; // free in this pass
        for (totals, 0..) |*sum, r| sum.* = work.total.total(r);
        var index: usize = 0;
        for (&work.job.cache.tiers) |*tier| {
            const count = unit_count(tier);
            if (count == 0) continue;
            work.prepare_rows(tier);
            for (0..count) |_| {
                const unit = work.job.unit_at(index);
                index += 1;
                const range = work.seen(unit);
                var position = range.start;
                while (position < range.end) {
                    const window: Window = .init(tier, position, range.end, work.head);
                    var row: usize = 0;
                    while (row < work.rows) {
                        const rows = row_count(work.rows - row);
                        var step: Step = .init(work, tier, unit, &window, row, rows);
                        if (step.any_seen()) step.add_mass(work.total.top[row..], totals[row..]);
                        row += rows;
                    }
                    position = window.end;
                }
            }
        }
    }

    /// Adds the logit sinks, normalises, writes the outputs and log-sum-exps.
    fn finish(work: *Work) void {
        const request = work.job.request;
        const dim = work.job.cache.config.value_dim;
        const sinks: ?[*]const f32 = @ptrCast(@alignCast(request.options.sinks));
        const lse: ?[*]f32 = @ptrCast(@alignCast(request.options.lse));
        for (0..work.rows) |r| {
            const head = work.query_head_of(r);
            if (sinks) |logits| work.total.add_sink(r, @max(logits[head] * softmax.log2_e, softmax.hidden / 10));
            const sum = work.total.total(r);
            const inverse = if (sum > 0) 1 / sum else 0;
            const row = work.query_of(r) * request.query_heads + head;
            const outputs = work.total.outputs[r * work.total.dim ..][0..dim];
            // Adding zero turns a negative zero into zero, whichever way it arose.
            for (outputs, request.out[row * dim ..][0..dim]) |x, *out| out.* = x * inverse + 0;
            if (lse) |l| l[row] = work.total.log_sum_exp(r);
        }
    }
};

fn row_count(rows_left: usize) usize {
    return if (rows_left >= 4) 4 else if (rows_left >= 2) 2 else 1;
}

/// Up to 64 slots of one page that kernels take at once.
const Window = struct {
    keys: [*]const u8,
    values: [*]const u8,
    next_keys: [*]const u8,
    next_values: [*]const u8,
    /// Position of slot 0.
    base: u64,
    /// Position after the last slot in use.
    end: u64,

    fn init(tier: *const Tier, position: u64, end: u64, head: usize) Window {
        const at = locate(tier, position, head);
        const number = position / tier.tokens_per_page;
        const page_end = (number + 1) * tier.tokens_per_page;
        const window_end = @min(end, page_end, at.base + format.page_tokens);
        const next = if (window_end < end) locate(tier, window_end, head) else at;
        return .{
            .keys = at.keys,
            .values = at.values,
            .next_keys = next.keys,
            .next_values = next.values,
            .base = at.base,
            .end = window_end,
        };
    }

    const Location = struct { keys: [*]const u8, values: [*]const u8, base: u64 };

    fn locate(tier: *const Tier, position: u64, head: usize) Location {
        const number = position / tier.tokens_per_page;
        const page = tier.page_at(number, head);
        const slot: usize = @intCast(position % tier.tokens_per_page);
        const first = slot / format.page_tokens * format.page_tokens;
        return .{
            .keys = tier.keys_of(page) + (if (first == 0) 0 else first * tier.key.row_bytes()),
            .values = tier.values_of(page) + (if (first == 0) 0 else first * tier.value.row_bytes()),
            .base = number * tier.tokens_per_page + first,
        };
    }
};

/// A block of up to four rows against one window.
const Step = struct {
    work: *Work,
    tier: *const Tier,
    window: *const Window,
    row: usize,
    count: usize,
    /// Slots that each row sees, and their union in blocks of 16.
    first: [score.rows_max]u32,
    end: [score.rows_max]u32,
    first_block: usize,
    end_block: usize,
    scores: score.Scores align(64),

    fn init(work: *Work, tier: *const Tier, unit: Unit, window: *const Window, row: usize, count: usize) Step {
        var step: Step = .{
            .work = work,
            .tier = tier,
            .window = window,
            .row = row,
            .count = count,
            .first = @splat(0),
            .end = @splat(0),
            .first_block = format.blocks_per_page,
            .end_block = 0,
            .scores = undefined,
        };
        for (0..count) |r| {
            const visible = work.visible(row + r);
            const start = @max(unit.start, visible.start, window.base);
            const end = @min(unit.end, visible.end, window.end);
            if (start >= end) continue;
            step.first[r] = @intCast(start - window.base);
            step.end[r] = @intCast(end - window.base);
            step.first_block = @min(step.first_block, step.first[r] / format.block_slots);
            step.end_block = @max(step.end_block, (step.end[r] - 1) / format.block_slots + 1);
        }
        return step;
    }

    fn any_seen(step: *const Step) bool {
        return step.end_block > step.first_block;
    }

    /// Scores become logits; unseen slots are hidden.
    fn compute_logits(step: *Step) void {
        const table = step.work.job.table;
        table.score[@backingInt(step.tier.key.format)][kernels.Table.row_index(step.count)](&.{
            .keys = step.window.keys,
            .next = if (step.row == 0) step.window.next_keys else step.window.keys,
            .dim = step.tier.key.dim_stored(),
            .query = &step.work.query,
            .row = step.row,
            .first_block = step.first_block,
            .end_block = step.end_block,
            .scores = &step.scores,
        });
        const options = &step.work.job.request.options;
        const plain = options.softcap == 0 and options.alibi_slopes == null and options.mask == null;
        if (plain and step.all_seen()) return;
        step.adjust();
    }

    fn all_seen(step: *const Step) bool {
        for (0..step.count) |r| {
            if (step.first[r] != 0 or step.end[r] != format.page_tokens) return false;
        }
        return true;
    }

    fn adjust(step: *Step) void {
        const work = step.work;
        const request = work.job.request;
        const options = &request.options;
        const slopes: ?[*]const f32 = @ptrCast(@alignCast(options.alibi_slopes));
        var args: softmax.AdjustArgs = .{
            .scores = &step.scores,
            .rows = step.count,
            .first = step.first,
            .end = step.end,
            .softcap = options.softcap * softmax.log2_e,
            .alibi = @intFromBool(slopes != null),
            .slopes = @splat(0),
            .distances = @splat(0),
            .mask_kind = @backingInt(request.mask_kind),
            .masks = @splat(0),
        };
        for (0..step.count) |r| {
            const head = work.query_head_of(step.row + r);
            if (slopes) |s| args.slopes[r] = s[head] * softmax.log2_e;
            args.distances[r] = @as(i64, @intCast(step.window.base)) - @as(i64, @intCast(work.query_position(step.row + r)));
            if (request.mask_kind == .none) continue;
            const entry = @as(i64, @intCast(work.query_of(step.row + r))) * options.mask_query_stride +
                @as(i64, @intCast(head)) * options.mask_head_stride + step.column();
            const size: i64 = if (request.mask_kind == .boolean) 1 else 4;
            args.masks[r] = @intFromPtr(options.mask.?) +% offset(entry * size);
        }
        work.job.table.adjust(&args);
    }

    /// Index of slot 0 among the live tokens; negative where slot 0 is not live.
    fn column(step: *const Step) i64 {
        var before: u64 = 0;
        for (&step.work.job.cache.tiers) |*tier| {
            if (tier == step.tier) break;
            before += tier.tokens();
        }
        const index: i64 = @intCast(before);
        return index + @as(i64, @intCast(step.window.base)) - @as(i64, @intCast(step.tier.start));
    }

    fn accumulate(step: *Step, state: State) void {
        const table = step.work.job.table;
        var corrections: [score.rows_max]f32 = undefined;
        step.compute_logits();
        table.update(&.{
            .scores = &step.scores,
            .rows = step.count,
            .running = .{ .top = state.top.ptr + step.row, .sums = state.sums.ptr + step.row * vec.lanes },
            .corrections = &corrections,
        });
        table.accumulate[@backingInt(step.tier.value.format)][kernels.Table.row_index(step.count)](&.{
            .values = step.window.values,
            .next = if (step.row == 0) step.window.next_values else step.window.values,
            .dim = step.tier.value.dim_stored(),
            .first_block = step.first_block,
            .end_block = step.end_block,
            .weights = &step.scores,
            .corrections = &corrections,
            .outputs = state.outputs.ptr + step.row * state.dim,
            .output_stride = state.dim,
        });
    }

    fn add_mass(step: *Step, top: []const f32, totals: []const f32) void {
        step.compute_logits();
        var args: softmax.MassArgs = .{
            .scores = &step.scores,
            .rows = step.count,
            .top = top.ptr,
            .total = totals.ptr,
            .first = step.first,
            .end = step.end,
            .mass = @splat(0),
        };
        const live: i64 = @intCast(step.work.job.cache.len());
        for (0..step.count) |r| {
            const head: i64 = @intCast(step.work.query_head_of(step.row + r));
            args.mass[r] = @intFromPtr(step.work.mass.?) +% offset((head * live + step.column()) * 4);
        }
        step.work.job.table.add_mass(&args);
    }
};

/// A signed byte offset for wrapping addition to an address.
fn offset(bytes: i64) usize {
    return @truncate(@as(u64, @bitCast(bytes)));
}
