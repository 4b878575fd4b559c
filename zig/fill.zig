//! Writes the tokens of an append into pages that are already there: rows are read (from the
//! caller, or from the tail for tokens that migrate), rounded, rotated and packed. kv heads are
//! shared out among threads; a head's pages are nobody else's. Called by append.zig; calls the
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
    pub fn init(own: scratch.Block, values: u64, heads: usize) error{OutOfMemory}!Workspace {
        const workers = if (values < threads.parallel_values_min) 1 else threads.thread_count();
        const count = @min(workers, heads, scratch.Lanes.count_max);
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
/// tier holds them, or would have held them, if there is one: `through`. False if something was
/// above the source's limits: then what was written is not to be used.
pub fn fill(
    tier: *Tier,
    start: u64,
    end: u64,
    source: *const Source,
    through: ?*const Tier,
    workspace: *Workspace,
) bool {
    if (start >= end) return true;
    var job: Job = .{
        .table = dispatch.table(),
        .tier = tier,
        .start = start,
        .end = end,
        .source = source,
        .through = through,
        .lanes = &workspace.lanes,
    };
    const heads: u32 = @intCast(tier.heads);
    if (workspace.lanes.count > 1) {
        threads.run(heads, &job, Job.fill_head);
    } else for (0..heads) |head| Job.fill_head(&job, @intCast(head));
    return !job.refused.load(.monotonic);
}

const Job = struct {
    table: *const kernels.Table,
    tier: *Tier,
    start: u64,
    end: u64,
    source: *const Source,
    through: ?*const Tier,
    lanes: *scratch.Lanes,
    refused: std.atomic.Value(bool) = .init(false),

    fn fill_head(context: *anyopaque, head: u32) void {
        const job: *Job = @ptrCast(@alignCast(context));
        const lane = job.lanes.take();
        defer job.lanes.give(lane);
        const rows = job.lanes.memory(lane);
        const tier = job.tier;
        var position = job.start;
        while (position < job.end and !job.refused.load(.monotonic)) {
            const number = position / tier.tokens_per_page;
            const slot: usize = @intCast(position % tier.tokens_per_page);
            const room = @min(tier.tokens_per_page - slot, page_room(slot));
            const run: Run = .{
                .position = position,
                .slot = slot,
                .count = @intCast(@min(job.end - position, room)),
                .head = head,
            };
            const page = tier.page_at(number, head);
            position += run.count;
            // Only what is packed as a whole page has time for this.
            const whole = run.count == format.page_tokens;
            const values = if (whole) job.next(.value, run.position, head) else Next.none;
            job.fill_half(.key, tier.key, tier.keys_of(page), run, rows, values);
            const more = whole and job.end - position >= format.page_tokens;
            const keys = if (more) job.next(.key, position, head) else Next.none;
            job.fill_half(.value, tier.value, tier.values_of(page), run, rows, keys);
        }
    }

    /// What fills a half of the page from `position` on, and where.
    fn next(job: *const Job, comptime side: Side, position: u64, head: u32) Next {
        const half = job.tier.half(side);
        const number = position / job.tier.tokens_per_page;
        return .{
            .rows = job.input_rows(side, position, format.page_tokens, head),
            .target = if (half.quantized())
                .of(job.tier.half_at(side, number, head)[0..half.bytes()])
            else
                .none,
        };
    }

    /// Slots from `slot` to the end of its window of 64.
    fn page_room(slot: usize) usize {
        return format.page_tokens - slot % format.page_tokens;
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
        job.read(side, half, run, .{ .rows = rows.ptr });
        if (half.centred) job.choose_offsets(side, half, base, run, rows);
        recode.encode_and_fetch(half, side, base, run.slot, run.count, rows.ptr, ahead);
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

    /// The caller's rows of a run; none if some of its tokens come from the tail.
    fn input_rows(
        job: *const Job,
        comptime side: Side,
        position: u64,
        count: usize,
        head: usize,
    ) rows_file.Rows {
        if (count == 0 or position < job.source.first) return .none;
        const input = if (side == .key) &job.source.keys else &job.source.values;
        return input.rows(position - job.source.first, head, count);
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
        const limit = if (source.limits) |limits| limits[@backingInt(side)] else unlimited;
        const accepted = job.read_rows(given, half, from_tail, target, limit);
        if (source.limits != null and !accepted) job.refused.store(true, .monotonic);
    }

    const unlimited = std.math.inf(f32);

    /// Rows from the run's token `first` on; whether they are within the limit.
    fn read_rows(
        job: *Job,
        from: rows_file.Rows,
        half: Half,
        first: usize,
        target: Target,
        limit: f32,
    ) bool {
        const dim = half.dim_stored();
        return switch (target) {
            .page => |at| job.table.store[@backingInt(half.format)].?(&.{
                .rows = from,
                .target = at + first * half.row_bytes(),
                .dim_stored = dim,
                .limit = limit,
            }),
            .rows => |rows| job.table.read(&.{
                .rows = from,
                .target = rows + first * dim,
                .dim_stored = dim,
                .tail_format = @backingInt(job.source.tail.key.format),
                .rotated = half.rotated,
                .limit = limit,
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
