//! Writes the tokens of an append into pages that are already there: rows are read (from the
//! caller, or from the tail for tokens that migrate), rounded, rotated and packed. Windows of 64
//! slots are shared out among threads; none is anybody else's. Called by append.zig; calls the
//! kernel table.
const std = @import("std");
const abi = @import("abi.zig");
const dispatch = @import("dispatch.zig");
const format = @import("format.zig");
const kernels = @import("kernels.zig");
const recode = @import("recode.zig");
const rows_file = @import("rows.zig");
const scratch = @import("scratch.zig");
const threads = @import("threads.zig");
const Ahead = @import("ahead.zig").Ahead;
const Half = format.Half;
const Input = @import("input.zig").Input;
const Next = rows_file.Next;
const Parts = threads.Parts;
const Side = format.Side;
const Tier = @import("tier.zig").Tier;

/// Where the rows of an append lie: the caller's from position `first` on, the tail's before.
pub const Source = struct {
    keys: Input,
    values: Input,
    first: u64,
    tail: *const Tier,
    /// For tokens that go to the store: the first that migrates, the length of a batch, and the
    /// number of the first page that was not there before.
    migrating_from: u64,
    batch: u64,
    new_page: u64,
    /// The newest tokens kept behind the window, if there are any.
    kept: ?*const Tier,
    /// Largest magnitudes of keys and values, of which is not known yet whether they are above.
    limits: ?[2]f32 = null,
};

/// Working memory for `fill`: rows of a page for every thread that may take part.
pub const Workspace = struct {
    block: scratch.Block,
    lanes: scratch.Lanes,
    borrowed: bool,

    /// `own` serves appends of few tokens, so that they allocate nothing.
    pub fn init(own: scratch.Block, values: u64) error{OutOfMemory}!Workspace {
        const workers = if (values < threads.parallel_values_min) 1 else threads.thread_count();
        const count = @min(workers, scratch.Lanes.count_max);
        if (count == 1) return .{ .block = own, .lanes = .init(own, 1), .borrowed = false };
        const block = try scratch.acquire(count * own.len);
        const used: scratch.Block = @alignCast(block[0 .. count * own.len]);
        return .{ .block = block, .lanes = .init(used, count), .borrowed = true };
    }

    pub fn deinit(workspace: *Workspace) void {
        if (workspace.borrowed) scratch.release(workspace.block);
    }
};

/// Writes the positions [start, end), which `tier` covers. Tokens get into the store as the warm
/// tier holds them, or would have held them, if there is one: `through`.
pub fn fill(
    tier: *Tier,
    start: u64,
    end: u64,
    source: *const Source,
    through: ?*const Tier,
    workspace: *Workspace,
) void {
    if (start >= end) return;
    var job: Job = .init(tier, start, end, source, workspace);
    job.through = through;
    job.work(workspace);
}

/// Writes all of `rows`, if there are any, while the rest of the source's `tokens` is checked; at
/// once, because starting threads takes long. False if anything was above the source's limits:
/// then what was written is not to be used.
pub fn fill_and_check(
    rows: ?*Tier,
    source: *const Source,
    tokens: u64,
    workspace: *Workspace,
) bool {
    const start, const end = if (rows) |new| .{ new.start, new.end } else .{ 0, 0 };
    var job: Job = .init(rows orelse source.tail, start, end, source, workspace);
    job.checked = .{
        .first = start -| source.first,
        .end = end -| source.first,
        .tokens = tokens,
    };
    job.work(workspace);
    return !job.refused.load(.monotonic);
}

/// Tokens of the source: all but [first, end).
const Rest = struct {
    first: u64,
    end: u64,
    tokens: u64,

    const none: Rest = .{ .first = 0, .end = 0, .tokens = 0 };

    fn count(rest: *const Rest) u64 {
        return rest.tokens - (rest.end - rest.first);
    }

    fn token(rest: *const Rest, index: u64) u64 {
        return if (index < rest.first) index else index - rest.first + rest.end;
    }
};

const Job = struct {
    table: *const kernels.Table,
    tier: *const Tier,
    start: u64,
    end: u64,
    source: *const Source,
    through: ?*const Tier = null,
    checked: Rest = .none,
    lanes: *scratch.Lanes,
    /// Windows of 64 slots of a page, and those of one head in which there is something to write.
    in_page: u64 = undefined,
    first_window: u64 = undefined,
    per_head: u64 = undefined,
    /// Of the windows of all heads, head after head, and of the tokens that are only checked.
    windows: Parts = undefined,
    checks: Parts = undefined,
    refused: std.atomic.Value(bool) = .init(false),

    fn init(
        tier: *const Tier,
        start: u64,
        end: u64,
        source: *const Source,
        workspace: *Workspace,
    ) Job {
        var job: Job = .{
            .table = dispatch.table(),
            .tier = tier,
            .start = start,
            .end = end,
            .source = source,
            .lanes = &workspace.lanes,
        };
        job.in_page = std.math.divCeil(u64, tier.tokens_per_page, format.page_tokens) catch
            unreachable;
        job.first_window = job.window_of(start);
        job.per_head = if (start < end) job.window_of(end - 1) - job.first_window + 1 else 0;
        job.windows = .of(@intCast(job.per_head * tier.heads), workspace.lanes.count);
        return job;
    }

    fn work(job: *Job, workspace: *const Workspace) void {
        job.checks = .of(@intCast(job.checked.count()), workspace.lanes.count);
        const tasks = job.windows.count() + job.checks.count();
        if (workspace.lanes.count > 1) {
            threads.run(tasks, job, run_task);
        } else for (0..tasks) |task| run_task(job, @intCast(task));
    }

    fn run_task(context: *anyopaque, task: u32) void {
        const job: *Job = @ptrCast(@alignCast(context));
        const fills = job.windows.count();
        if (task < fills) job.fill_windows(task) else job.check(task - fills);
    }

    fn check(job: *Job, part: u32) void {
        const source = job.source;
        const heads = job.tier.heads;
        const first, const end = job.checks.part(part);
        for (first..end) |index| {
            if (job.refused.load(.monotonic)) return;
            const token = job.checked.token(index);
            if (source.keys.accepts(token, heads, source.limits.?[0]) and
                source.values.accepts(token, heads, source.limits.?[1])) continue;
            job.refused.store(true, .monotonic);
        }
    }

    /// The number of a position's window of 64 slots: every page begins with a window.
    fn window_of(job: *const Job, position: u64) u64 {
        const per_page = job.tier.tokens_per_page;
        return position / per_page * job.in_page + position % per_page / format.page_tokens;
    }

    /// What is to be written of window `index`, of all heads' windows.
    fn run_of(job: *const Job, index: u64) Run {
        const per_page = job.tier.tokens_per_page;
        const window = job.first_window + index % job.per_head;
        const page_start = window / job.in_page * per_page;
        const first = page_start + window % job.in_page * format.page_tokens;
        const position = @max(first, job.start);
        const end = @min(first + format.page_tokens, page_start + per_page, job.end);
        return .{
            .position = position,
            .slot = @intCast(position - page_start),
            .count = @intCast(end - position),
            .head = @intCast(index / job.per_head),
        };
    }

    fn fill_windows(job: *Job, part: u32) void {
        const lane = job.lanes.take();
        defer job.lanes.give(lane);
        const rows = job.lanes.memory(lane);
        const tier = job.tier;
        const first, const end = job.windows.part(part);
        var run_here = job.run_of(first);
        for (first..end) |index| {
            if (job.refused.load(.monotonic)) return;
            const here = run_here;
            const page = tier.page_at(here.position / tier.tokens_per_page, here.head);
            // Only what is packed as a whole page has time for this.
            const whole = here.count == format.page_tokens;
            const values = if (whole) job.next(.value, here) else Next.none;
            job.fill_half(.key, tier.key, tier.keys_of(page), here, rows, values);
            const more = index + 1 < end;
            if (more) run_here = job.run_of(index + 1);
            const keys = if (whole and more) job.next(.key, run_here) else Next.none;
            job.fill_half(.value, tier.value, tier.values_of(page), here, rows, keys);
        }
    }

    /// What fills a half of a window, and where.
    fn next(job: *const Job, comptime side: Side, coming: Run) Next {
        // What comes through the warm tier is not read from the tail.
        if (coming.count < format.page_tokens or job.through != null) return .none;
        const half = job.tier.half(side);
        const number = coming.position / job.tier.tokens_per_page;
        return .{
            .rows = job.given_rows(side, coming),
            .target = if (half.quantized())
                .of(job.tier.half_at(side, number, coming.head)[0..half.bytes()])
            else
                .none,
        };
    }

    /// Consecutive tokens of one head within one page.
    const Run = struct {
        position: u64,
        slot: usize,
        count: usize,
        head: usize,

        fn without(run: Run, first: usize) Run {
            var rest = run;
            rest.position += first;
            rest.slot += first;
            rest.count -= first;
            return rest;
        }
    };

    fn fill_half(
        job: *Job,
        comptime side: Side,
        half: Half,
        base: [*]u8,
        run: Run,
        rows: []f32,
        ahead: Next,
    ) void {
        if (job.through) |warm| return job.fill_through(warm, side, half, base, run, rows);
        const dim = half.dim_stored();
        const f = @backingInt(half.format);
        if (!half.quantized()) {
            const at = base + run.slot * half.row_bytes();
            const like_tail = half.format == job.source.tail.key.format;
            if (like_tail) return job.read(side, half, run, .{ .page = at });
            job.read(side, half, run, .{ .rows = rows.ptr });
            _ = job.table.store[f].?(&.{
                .rows = .{
                    .first = @intFromPtr(rows.ptr),
                    .stride_bytes = @intCast(dim * @sizeOf(f32)),
                    .dtype = @backingInt(abi.Dtype.f32),
                    .count = run.count,
                    .dim = dim,
                },
                .target = at,
                .dim_stored = dim,
                .limit = unlimited,
            });
            return;
        }
        if (job.pack(side, half, base, run, rows, ahead)) return;
        job.read(side, half, run, .{ .rows = rows.ptr });
        if (half.centred) job.choose_offsets(side, half, base, run, rows);
        recode.encode_and_fetch(half, side, base, run.slot, run.count, rows.ptr, ahead);
    }

    /// Reads and packs a whole page at once, if its rows lie in one place and its format can be.
    fn pack(
        job: *Job,
        comptime side: Side,
        half: Half,
        base: [*]u8,
        run: Run,
        rows: []f32,
        ahead: Next,
    ) bool {
        const f = @backingInt(half.format);
        const kernel = if (side == .key) job.table.pack_keys[f] else job.table.pack_values[f];
        if (kernel == null or run.count < format.page_tokens) return false;
        const given = job.given_rows(side, run);
        if (given.count == 0) return false;
        const accepted = kernel.?(&.{
            .half = base,
            .rows = given,
            .memory = rows.ptr,
            .dim = half.dim_stored(),
            .tail_format = @backingInt(job.source.tail.key.format),
            .rotated = half.rotated,
            .limit = if (run.position < job.source.first) unlimited else job.limit(side),
            .ahead = ahead,
        });
        job.note(accepted);
        return true;
    }

    /// Values without limits were accepted before.
    fn note(job: *Job, accepted: bool) void {
        if (job.source.limits != null and !accepted) job.refused.store(true, .monotonic);
    }

    /// Up to which magnitude the caller's values are accepted, if that is not known yet.
    fn limit(job: *const Job, comptime side: Side) f32 {
        const limits = job.source.limits orelse return unlimited;
        return limits[@backingInt(side)];
    }

    /// Packs the run's rows as the warm tier has them.
    fn fill_through(
        job: *Job,
        warm: *const Tier,
        comptime side: Side,
        half: Half,
        base: [*]u8,
        run: Run,
        rows: []f32,
    ) void {
        const from = warm.half(side);
        if (std.meta.eql(from, half)) { // the same bits
            const held: usize = @intCast(@min(run.count, warm.end -| run.position));
            const number = run.position / warm.tokens_per_page;
            const bytes = base[0..half.bytes()];
            for (run.slot..run.slot + held) |slot| {
                const source = warm.half_at(side, number, run.head);
                recode.copy(half, side, source, bytes, slot);
            }
            const rest = run.without(held);
            if (rest.count == 0) return;
            job.read(side, half, rest, .{ .rows = rows.ptr });
            return recode.encode(half, side, base, rest.slot, rest.count, rows.ptr);
        }
        job.fetch(side, half, run, rows);
        if (half.centred) job.choose_offsets(side, half, base, run, rows);
        recode.encode(half, side, base, run.slot, run.count, rows.ptr);
    }

    /// The run's rows as `half` wants them: at tail precision, or as the warm tier has them, from
    /// its pages, or through a page of its format for tokens that never were there.
    fn fetch(job: *Job, comptime side: Side, half: Half, run: Run, memory: []f32) void {
        const warm = job.through orelse
            return job.read(side, half, run, .{ .rows = memory.ptr });
        const from = warm.half(side);
        const page: [*]u8 = @ptrCast(memory[memory.len / 2 ..].ptr);
        const held: usize = @intCast(@min(run.count, warm.end -| run.position));
        if (held > 0) {
            const number = run.position / warm.tokens_per_page;
            const source = warm.half_at(side, number, run.head);
            recode.decode(from, side, source, run.slot, held, memory.ptr);
        }
        const rest = run.without(held);
        if (rest.count > 0) {
            const new = memory[held * from.dim_stored() ..].ptr;
            job.read(side, from, rest, .{ .rows = new });
            recode.encode(from, side, page, rest.slot, rest.count, new);
            recode.decode(from, side, page, rest.slot, rest.count, new);
        }
        recode.change_space(from, half, run.count, memory.ptr);
    }

    /// A new page gets the offset of its tokens in the first batch that reaches it, whichever of
    /// them are in the run: so it does not matter how the stream was cut into appends. If tokens of
    /// the page are kept, it gets theirs. Leaves the run's rows where they are.
    fn choose_offsets(
        job: *Job,
        comptime side: Side,
        half: Half,
        base: [*]u8,
        run: Run,
        rows: []f32,
    ) void {
        const source = job.source;
        const page_start = run.position - run.slot;
        const fresh = page_start / format.page_tokens >= source.new_page;
        if (!fresh or run.position != @max(page_start, job.start)) return;
        if (kept_offsets(half, source, page_start / format.page_tokens, run.head)) |kept| {
            const dim = half.dim_stored();
            return @memcpy(@constCast(half.offsets(base))[0..dim], kept[0..dim]);
        }
        const first = @max(page_start, source.migrating_from);
        const batch_end = (first / source.batch + 1) * source.batch;
        const count: usize = @intCast(@min(page_start + format.page_tokens, batch_end) - first);
        if (first != run.position) { // tokens that are evicted at once count too
            const slot: usize = @intCast(first - page_start);
            const others: Run = .{
                .position = first,
                .slot = slot,
                .count = count,
                .head = run.head,
            };
            job.fetch(side, half, others, rows);
        }
        recode.set_offsets(half, base, count, rows.ptr);
        if (first != run.position) job.fetch(side, half, run, rows);
    }

    fn kept_offsets(half: Half, source: *const Source, number: u64, head: usize) ?[*]const u8 {
        const kept = source.kept orelse return null;
        if ((kept.end - 1) / kept.tokens_per_page != number) return null;
        return half.offsets(kept.keys_of(kept.page_at(number, head)));
    }

    /// The rows of a run, the caller's or the tail's; none if it has some of both.
    fn given_rows(job: *const Job, comptime side: Side, coming: Run) rows_file.Rows {
        const source = job.source;
        if (coming.position + coming.count <= source.first) {
            return tail_rows(side, source.tail, coming, coming.count);
        }
        if (coming.position < source.first) return .none;
        const input = if (side == .key) &source.keys else &source.values;
        return input.rows(coming.position - source.first, coming.head, coming.count);
    }

    /// Where rows go at tail precision: to a page that holds just that, or to working memory.
    const Target = union(enum) { page: [*]u8, rows: [*]f32 };

    /// The run's rows at tail precision, as `half` wants them.
    fn read(job: *Job, comptime side: Side, half: Half, run: Run, target: Target) void {
        const source = job.source;
        const from_tail: usize = if (run.position >= source.first)
            0
        else
            @intCast(@min(run.count, source.first - run.position));
        if (from_tail > 0) {
            const held = tail_rows(side, source.tail, run, from_tail);
            _ = job.read_rows(held, half, 0, target, unlimited);
        }
        if (from_tail == run.count) return;
        const input = if (side == .key) &source.keys else &source.values;
        const token = run.position + from_tail - source.first;
        const given = input.rows(token, run.head, run.count - from_tail);
        job.note(job.read_rows(given, half, from_tail, target, job.limit(side)));
    }

    const unlimited = std.math.inf(f32);

    /// Rows from the run's token `first` on; whether they are within the limit.
    fn read_rows(
        job: *Job,
        from: rows_file.Rows,
        half: Half,
        first: usize,
        target: Target,
        most: f32,
    ) bool {
        const dim = half.dim_stored();
        return switch (target) {
            .page => |at| job.table.store[@backingInt(half.format)].?(&.{
                .rows = from,
                .target = at + first * half.row_bytes(),
                .dim_stored = dim,
                .limit = most,
            }),
            .rows => |rows| job.table.read(&.{
                .rows = from,
                .count = from.count,
                .target = rows + first * dim,
                .dim_stored = dim,
                .tail_format = @backingInt(job.source.tail.key.format),
                .rotated = half.rotated,
                .limit = most,
            }),
        };
    }

    /// Tokens that migrate. Pages of store and tail cover the same positions, so they lie in one
    /// page.
    fn tail_rows(comptime side: Side, tail: *const Tier, run: Run, count: usize) rows_file.Rows {
        const half = if (side == .key) tail.key else tail.value;
        const page = tail.page_at(run.position / tail.tokens_per_page, run.head);
        const base = if (side == .key) tail.keys_of(page) else tail.values_of(page);
        const slot: usize = @intCast(run.position % tail.tokens_per_page);
        return rows_file.of_half(half, base + slot * half.row_bytes(), count, half.dim);
    }
};
