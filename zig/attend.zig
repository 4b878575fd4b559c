//! Attention over a cache. Work is cut into units (a tier's tokens within one chunk of positions)
//! and blocks of query rows, always in the same way; a unit's result depends on its tokens alone,
//! and units merge in the order of positions. So a query gives the same bits alone or in a batch,
//! on one thread or many. Called by abi.zig and attend_many.zig; calls the kernel table, state.zig,
//! spill.zig and threads.zig.
const std = @import("std");
const ahead = @import("ahead.zig");
const block_file = @import("block.zig");
const cache_file = @import("cache.zig");
const dispatch = @import("dispatch.zig");
const format = @import("format.zig");
const kernels = @import("kernels.zig");
const prepare = @import("prepare.zig");
const request_file = @import("request.zig");
const scratch = @import("scratch.zig");
const softmax = @import("softmax.zig");
const spill = @import("spill.zig");
const threads = @import("threads.zig");
const tile = @import("tile.zig");
const vec = @import("vec.zig");
const Block = block_file.Block;
const Cache = cache_file.Cache;
const Error = request_file.Error;
const Request = request_file.Request;
const State = @import("state.zig").State;
const Tier = @import("tier.zig").Tier;
const window_file = @import("window.zig");
const Window = window_file.Window;

/// Positions of a chunk: small enough to share among threads, large enough that merging costs
/// nothing.
const chunk_tokens = 2048;
/// Query rows that one task works on while a page is in the nearest cache.
const task_rows = block_file.rows_max;
/// Below this many bytes of tokens, waking other threads costs more than it gains.
const parallel_bytes_min = 1 << 20;

/// Attends, or says why not and leaves the outputs alone.
pub fn attend(cache: *Cache, request: *const Request) Error!void {
    try request_file.check(cache, request);
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    try request_file.check_held(cache, request);
    if (request.query_tokens == 0) return;
    var job: Job = .plan(cache, request);
    const workers = workers_for(job.bytes *| job.blocks);
    job.split = workers > 1 and job.block_tasks() < 4 * workers and job.units > 1;
    const lane_count: usize = @min(workers, job.tasks());
    const lanes_floats = lane_count * job.lane_floats();
    const memory = try scratch.acquire(lanes_floats + job.partial_floats());
    defer scratch.release(memory);
    var lanes: scratch.Lanes = .init(memory[0..lanes_floats], lane_count);
    job.lanes = &lanes;
    job.partials = @alignCast(memory[lanes_floats..]);
    if (lane_count > 1) {
        threads.run(@intCast(job.tasks()), &job, Job.run_task);
    } else for (0..job.tasks()) |task| Job.run_task(&job, @intCast(task));
    job.finish();
}

/// Threads worth waking to read so many bytes.
pub fn workers_for(bytes: usize) usize {
    if (bytes < parallel_bytes_min) return 1;
    return @min(threads.thread_count(), scratch.Lanes.count_max);
}

/// Tokens of one run of the cache.
pub const Unit = struct { run: usize, start: u64, end: u64 };

/// One request, cut into tasks.
pub const Job = struct {
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
    /// Bytes that the tokens held take.
    bytes: usize,
    /// Whether units are tasks of their own, merged afterwards.
    split: bool,
    /// Where tasks work; shared with other jobs that run at the same time.
    lanes: *scratch.Lanes,
    /// With `split`: (kv head, block, unit) states.
    partials: []align(64) f32,

    /// The caller chooses `split` and gives `lanes` and `partials`.
    pub fn plan(cache: *Cache, request: *const Request) Job {
        const ratio = request.query_heads / cache.config.num_kv_heads;
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
            .bytes = 0,
            .split = false,
            .lanes = undefined,
            .partials = &.{},
        };
        for (0..cache.run_count()) |i| {
            const tier = cache.run(i);
            job.units += unit_count(tier);
            const token_bytes = tier.page_bytes() / @as(usize, @intCast(tier.tokens_per_page));
            job.bytes += @as(usize, @intCast(tier.tokens())) * token_bytes * tier.heads;
        }
        return job;
    }

    /// Blocks of query rows of all kv heads.
    pub fn block_tasks(job: *const Job) usize {
        return job.cache.config.num_kv_heads * job.blocks;
    }

    pub fn tasks(job: *const Job) usize {
        return job.block_tasks() * if (job.split) job.units else 1;
    }

    pub fn partial_floats(job: *const Job) usize {
        return if (job.split) job.tasks() * State.floats(job.rows_max, job.value_dim()) else 0;
    }

    fn value_dim(job: *const Job) usize {
        return std.mem.alignForward(usize, job.cache.config.value_dim, format.group);
    }

    fn key_dim(job: *const Job) usize {
        return std.mem.alignForward(usize, job.cache.config.head_dim, format.group);
    }

    /// f32 values that a task works in: a prepared query, three states, and an unpacked window.
    pub fn lane_floats(job: *const Job) usize {
        const dim = job.key_dim();
        const groups = std.mem.alignForward(usize, dim / format.group, vec.lanes);
        const query = job.rows_max * (dim + dim / 2 + 2 * groups);
        const states = 3 * State.floats(job.rows_max, job.value_dim());
        return std.mem.alignForward(usize, query, vec.lanes) + states + job.unpacked_floats();
    }

    /// Many rows are worth laying a window of floating-point values out for them first.
    fn unpacked_floats(job: *const Job) usize {
        if (job.rows_max < tile.rows_min) return 0;
        return format.page_tokens * (job.key_dim() + job.value_dim());
    }

    /// Tasks are independent and run in any order; `finish` comes after all of them.
    pub fn run_task(context: *anyopaque, index: u32) void {
        const job: *Job = @ptrCast(@alignCast(context));
        if (job.split) job.unit_task(index) else job.block_task(index);
    }

    pub fn finish(job: *Job) void {
        if (job.split) for (0..job.block_tasks()) |task| job.merge_partials(task);
        if (job.request.options.mass != null) job.run_mass();
    }

    /// A unit's share of one block, kept for `merge_partials`.
    fn unit_task(job: *Job, index: usize) void {
        const unit = job.unit_at(index % job.units);
        const lane = job.lanes.take();
        defer job.lanes.give(lane);
        var work: Work = .init(job, index / job.units, job.lanes.memory(lane));
        work.next_task = index + job.lanes.count;
        work.prepare_rows(job.cache.run(unit.run));
        _ = work.run_unit(unit, job.partial(index));
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

    fn block_task(job: *Job, index: usize) void {
        const lane = job.lanes.take();
        defer job.lanes.give(lane);
        // Later queries see more: the shortest tasks come last, and threads end together.
        const task = if (job.blocks > 1) job.block_tasks() - 1 - index else index;
        var work: Work = .init(job, task, job.lanes.memory(lane));
        work.next_task = index + job.lanes.count;
        work.fold(.computed);
    }

    fn unit_at(job: *const Job, index: usize) Unit {
        var rest = index;
        for (0..job.cache.run_count()) |i| {
            const units = unit_count(job.cache.run(i));
            if (rest < units) return job.unit_of(i, rest);
            rest -= units;
        }
        unreachable;
    }

    fn unit_of(job: *const Job, run: usize, index: usize) Unit {
        const tier = job.cache.run(run);
        const chunk = tier.start / chunk_tokens + index;
        return .{
            .run = run,
            .start = @max(tier.start, chunk * chunk_tokens),
            .end = @min(tier.end, (chunk + 1) * chunk_tokens),
        };
    }

    /// The probabilities of all tokens, in a second pass: one kv head after the other, its queries
    /// in order, so that every sum has a fixed order.
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

/// One block of query rows of one kv head. Row r is query `first_query + r / ratio`, head `r %
/// ratio` of the kv head's query heads.
pub const Work = struct {
    job: *Job,
    head: usize,
    block: usize,
    first_query: usize,
    rows: usize,
    query: prepare.Query,
    unit_state: State,
    tier_state: State,
    total: State,
    /// Room for a window of f32 keys and values; none where there are few rows.
    unpacked: []align(64) f32,
    mass: ?[*]f32 = null,
    /// What this thread takes up next, if tasks take equal times.
    next_task: usize = std.math.maxInt(usize),

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
        const unpacked = memory[0..job.unpacked_floats()];
        memory = @alignCast(memory[unpacked.len..]);
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
            .unpacked = unpacked,
        };
    }

    /// Merges all units in order, tier by tier, and writes the outputs. The first unit of a tier
    /// and the first tier are not merged but taken, and a tier that no row sees is passed over:
    /// merging with an empty state gives the same bits.
    fn fold(work: *Work, units: enum { kept, computed }) void {
        const job = work.job;
        work.total.reset();
        var index: usize = 0;
        var prepared: ?format.Half = null;
        for (0..job.cache.run_count()) |run| {
            const tier = job.cache.run(run);
            const count = unit_count(tier);
            const all = work.seen(.{ .run = run, .start = tier.start, .end = tier.end });
            if (count == 0 or units == .computed and all.start >= all.end) continue;
            const state = if (index == 0) work.total else work.tier_state;
            if (units == .computed and !std.meta.eql(prepared, tier.key)) work.prepare_rows(tier);
            prepared = tier.key;
            for (0..count) |i| {
                const target = if (i == 0) state else work.unit_state;
                const next = switch (units) {
                    .kept => work.kept_unit(index),
                    .computed => work.run_unit(job.unit_of(run, i), target),
                };
                if (i > 0) state.merge(next) else if (units == .kept) state.take(next);
                index += 1;
            }
            if (tier.value.rotated) for (0..work.rows) |r| {
                const outputs = state.outputs.ptr + r * state.dim;
                job.table.rotate(outputs, tier.value.dim_stored());
            };
            if (index > count) work.total.merge(state);
        }
        work.finish();
    }

    fn kept_unit(work: *Work, index: usize) State {
        const task = work.head * work.job.blocks + work.block;
        return work.job.partial(task * work.job.units + index).first_rows(work.rows);
    }

    pub fn query_of(work: *const Work, row: usize) usize {
        return work.first_query + row / work.job.ratio;
    }

    pub fn query_head_of(work: *const Work, row: usize) usize {
        return work.head * work.job.ratio + row % work.job.ratio;
    }

    pub fn query_position(work: *const Work, row: usize) u64 {
        return work.job.cache.next -| work.job.request.query_tokens + work.query_of(row);
    }

    /// Positions that a row may see: [start, end).
    pub fn visible(work: *const Work, row: usize) struct { start: u64, end: u64 } {
        const options = &work.job.request.options;
        const position = work.query_position(row);
        return .{
            .start = if (options.window == 0) 0 else (position + 1) -| options.window,
            .end = if (options.causal != 0) position + 1 else work.job.cache.next,
        };
    }

    fn request_row(work: *const Work, r: usize) usize {
        return work.query_of(r) * work.job.request.query_heads + work.query_head_of(r);
    }

    fn query_row(work: *const Work, r: usize) []const f32 {
        const dim = work.job.cache.config.head_dim;
        return work.job.request.query[work.request_row(r) * dim ..][0..dim];
    }

    fn output_row(work: *const Work, r: usize) []f32 {
        const dim = work.job.cache.config.value_dim;
        return work.job.request.out[work.request_row(r) * dim ..][0..dim];
    }

    fn prepare_rows(work: *Work, tier: *const Tier) void {
        const request = work.job.request;
        const softcap = request.options.softcap;
        const plain = request.scale * softmax.log2_e;
        const factor = if (softcap == 0) plain else 2 * plain / softcap;
        for (0..work.rows) |r| {
            if (r + rows_ahead < work.rows) ahead.fetch_row(work.query_row(r + rows_ahead));
            work.job.table.prepare[@backingInt(tier.key.format)](&.{
                .source = work.query_row(r).ptr,
                .source_dim = work.job.cache.config.head_dim,
                .factor = factor,
                .rotated = tier.key.rotated,
                .row = r,
                .query = &work.query,
            });
        }
    }

    /// Positions that rows of the block may see within a unit.
    fn seen(work: *const Work, unit: Unit) window_file.Seen {
        const first = work.visible(0);
        const last = work.visible(work.rows - 1); // later queries see later positions
        return .{
            .start = @max(unit.start, first.start),
            .end = @min(unit.end, last.end),
            .start_for_all = @max(unit.start, last.start),
            .end_for_all = @min(unit.end, first.end),
        };
    }

    /// How far ahead of a unit this thread goes on reading.
    fn ahead_end(work: *const Work, unit: Unit) u64 {
        return if (work.job.split) unit.end else work.job.cache.run(unit.run).end;
    }

    /// Where this thread goes on after that: in the next tier, or with its next task.
    fn place_after(work: *const Work, unit: Unit) ?window_file.Place {
        const job = work.job;
        if (job.blocks > 1) return null; // the same page again, from a near cache
        if (job.split) {
            if (work.next_task >= job.tasks()) return null;
            const unit_after = job.unit_at(work.next_task % job.units);
            return work.place_of(unit_after, work.next_task / job.units);
        }
        for (unit.run + 1..job.cache.run_count()) |run| {
            if (unit_count(job.cache.run(run)) == 0) continue;
            return work.place_of(job.unit_of(run, 0), work.head);
        }
        if (work.next_task >= job.tasks()) return null;
        return work.place_of(job.unit_at(0), work.next_task);
    }

    fn place_of(work: *const Work, unit: Unit, head: usize) ?window_file.Place {
        const range = work.seen(unit);
        if (range.start >= range.end) return null;
        return .{ .tier = work.job.cache.run(unit.run), .position = range.start, .head = head };
    }

    fn run_unit(work: *Work, unit: Unit, state: State) State {
        const mine = state.first_rows(work.rows);
        mine.reset();
        work.walk(unit, .{ .state = mine });
        return mine;
    }

    fn fold_mass(work: *Work) void {
        const totals = work.unit_state.top; // free in this pass
        for (totals, 0..) |*sum, r| sum.* = work.total.total(r);
        for (0..work.job.cache.run_count()) |run| {
            const tier = work.job.cache.run(run);
            const count = unit_count(tier);
            if (count == 0) continue;
            work.prepare_rows(tier);
            for (0..count) |i| work.walk(work.job.unit_of(run, i), .{ .totals = totals });
        }
    }

    /// What a walk adds to: the running softmax, or the mass of tokens, given its totals.
    const Target = union(enum) { state: State, totals: []const f32 };

    /// Window by window, all rows against it.
    fn walk(work: *Work, unit: Unit, target: Target) void {
        const tier = work.job.cache.run(unit.run);
        const range = work.seen(unit);
        defer spill.leave(tier, range.start, range.end, work.head);
        const after = work.place_after(unit);
        const route: window_file.Route = .init(tier, work.head, work.ahead_end(unit), after);
        var block: Block = undefined;
        var window: Window = undefined;
        var position = range.start;
        while (position < range.end) {
            window.start(&route, position, range);
            if (work.unpacked.len > 0) window.unpack(work.job.table, tier, work.unpacked);
            var row: usize = 0;
            while (row < work.rows) : (row += block_file.rows_max) {
                block.start(work, tier, unit, &window, row);
                switch (target) {
                    .state => |state| block.accumulate(state),
                    .totals => |totals| block.add_mass(work.total.top, totals),
                }
            }
            position = window.end;
        }
    }

    /// Adds the logit sinks, normalises, writes the outputs and log-sum-exps.
    fn finish(work: *Work) void {
        const request = work.job.request;
        const sinks: ?[*]const f32 = @ptrCast(@alignCast(request.options.sinks));
        const lse: ?[*]f32 = @ptrCast(@alignCast(request.options.lse));
        for (0..work.rows) |r| {
            const head = work.query_head_of(r);
            if (sinks) |logits| {
                const logit = logits[head] * softmax.log2_e;
                // Lower ones are no tokens at all; -inf turns a sink off.
                if (logit > softmax.hidden / 10) work.total.add_sink(r, logit);
            }
            work.total.write(r, work.output_row(r));
            if (lse) |l| l[work.request_row(r)] = work.total.log_sum_exp(r);
        }
    }
};

/// Rows of one kv head lie far apart, where the processor does not look ahead by itself.
const rows_ahead = 4;
