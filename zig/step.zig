//! One step of attention: up to four query rows against up to 64 slots of a page. Called by
//! block.zig, kernel by kernel; calls the kernel table.
const accumulate_file = @import("accumulate.zig");
const attend = @import("attend.zig");
const Ahead = @import("ahead.zig").Ahead;
const format = @import("format.zig");
const score = @import("score.zig");
const softmax = @import("softmax.zig");
const vec = @import("vec.zig");
const State = @import("state.zig").State;
const Tier = @import("tier.zig").Tier;
const Unit = attend.Unit;
const Window = @import("window.zig").Window;
const Work = attend.Work;

/// Up to four query rows against one window.
pub const Step = struct {
    work: *Work,
    tier: *const Tier,
    window: *const Window,
    row: usize,
    count: usize,
    /// Slots that each row sees, and all of them together.
    first: [score.rows_max]u32,
    end: [score.rows_max]u32,
    first_slot: usize,
    end_slot: usize,
    /// Scores, then logits, then weights.
    scores: *align(64) score.Scores,
    /// What the softmax says of the weights.
    any_hidden: bool,
    corrections: [score.rows_max]f32,
    largest: [score.rows_max]f32,
    minor: [score.rows_max]bool,

    /// In place: a step is large, and there are many.
    pub fn start(
        step: *Step,
        work: *Work,
        tier: *const Tier,
        unit: Unit,
        window: *const Window,
        row: usize,
        count: usize,
        scores: *align(64) score.Scores,
    ) void {
        step.work = work;
        step.tier = tier;
        step.window = window;
        step.row = row;
        step.count = count;
        step.scores = scores;
        if (window.all_seen) {
            step.first = @splat(0);
            step.end = @splat(format.page_tokens);
            step.first_slot = 0;
            step.end_slot = format.page_tokens;
        } else step.look(unit);
    }

    /// What each row sees.
    fn look(step: *Step, unit: Unit) void {
        const window = step.window;
        step.first = @splat(0);
        step.end = @splat(0);
        step.first_slot = format.page_tokens;
        step.end_slot = 0;
        for (0..step.count) |r| {
            const visible = step.work.visible(step.row + r);
            const start_seen = @max(unit.start, visible.start, window.base);
            const end_seen = @min(unit.end, visible.end, window.end);
            if (start_seen >= end_seen) continue;
            step.first[r] = @intCast(start_seen - window.base);
            step.end[r] = @intCast(end_seen - window.base);
            step.first_slot = @min(step.first_slot, step.first[r]);
            step.end_slot = @max(step.end_slot, step.end[r]);
        }
    }

    pub fn any_seen(step: *const Step) bool {
        return step.end_slot > step.first_slot;
    }

    pub fn score_keys(step: *Step) void {
        const table = step.work.job.table;
        table.score[@backingInt(step.tier.key.format)][step.count - 1](&.{
            .keys = step.window.keys,
            .centred = step.tier.key.centred,
            .ahead = step.ahead(step.window.ahead_of_score),
            .dim = step.tier.key.dim_stored(),
            .query = &step.work.query,
            .row = step.row,
            .first_slot = step.first_slot,
            .end_slot = step.end_slot,
            .scores = step.scores,
        });
    }

    /// Scores become logits; unseen slots are hidden.
    pub fn make_logits(step: *Step) void {
        const options = &step.work.job.request.options;
        const plain = options.softcap == 0 and options.alibi_slopes == null and
            options.mask == null;
        if (plain and step.all_seen()) return;
        step.adjust();
    }

    /// One block of rows fetches for all.
    pub fn ahead(step: *const Step, lines: Ahead) Ahead {
        return if (step.row == 0) lines else .none;
    }

    fn all_seen(step: *const Step) bool {
        if (step.window.all_seen) return true;
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
            .scores = step.scores,
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
            args.distances[r] = @as(i64, @intCast(step.window.base)) - @as(
                i64,
                @intCast(work.query_position(step.row + r)),
            );
            if (request.mask_kind == .none) continue;
            const query: i64 = @intCast(work.query_of(step.row + r));
            const entry = query *% options.mask_query_stride +%
                @as(i64, @intCast(head)) *% options.mask_head_stride +% step.column();
            const size: i64 = if (request.mask_kind == .boolean) 1 else 4;
            args.masks[r] = @intFromPtr(options.mask.?) +% offset(entry *% size);
        }
        work.job.table.adjust(&args);
    }

    /// Index of slot 0 among the live tokens; negative where slot 0 is not live.
    fn column(step: *const Step) i64 {
        var before: u64 = 0;
        const cache = step.work.job.cache;
        for (0..cache.run_count()) |i| {
            if (cache.run(i) == step.tier) break;
            before += cache.run(i).tokens();
        }
        const index: i64 = @intCast(before);
        return index + @as(i64, @intCast(step.window.base)) - @as(i64, @intCast(step.tier.start));
    }

    /// Logits become weights.
    pub fn update(step: *Step, state: State) void {
        step.any_hidden = step.may_hide();
        step.work.job.table.update(&.{
            .scores = step.scores,
            .rows = step.count,
            .ahead = step.ahead(step.window.ahead_of_update),
            .running = .{
                .top = state.top.ptr + step.row,
                .sums = state.sums.ptr + step.row * vec.lanes,
            },
            .any_hidden = &step.any_hidden,
            .corrections = &step.corrections,
            .largest = &step.largest,
            .minor = &step.minor,
        });
    }

    /// Of the rows from `first` on.
    pub fn accumulate_args(
        step: *const Step,
        state: State,
        first: usize,
    ) accumulate_file.AccumulateArgs {
        return .{
            .values = step.window.values_for_many orelse step.window.values,
            .ahead = if (first == 0)
                step.ahead(step.window.ahead_of_accumulate)
            else
                .none,
            .dim = step.tier.value.dim_stored(),
            .first_slot = step.first_slot,
            .end_slot = step.end_slot,
            .weights = step.scores[first..].ptr,
            .any_hidden = step.any_hidden,
            .largest = step.largest[first..].ptr,
            .minor = step.minor[first..].ptr,
            .corrections = step.corrections[first..].ptr,
            .outputs = state.outputs.ptr + (step.row + first) * state.dim,
            .output_stride = state.dim,
        };
    }

    /// Values as they are stored. Where slots are hidden, quantized ones take rows together that
    /// see the same.
    pub fn accumulate(step: *const Step, state: State) void {
        const kernels = &step.work.job.table.accumulate[@backingInt(step.tier.value.format)];
        const together = !step.tier.value.quantized() or !step.any_hidden;
        var first: usize = 0;
        while (first < step.count) {
            const rows = if (together) step.count else step.alike(first);
            kernels[rows - 1](&step.accumulate_args(state, first));
            first += rows;
        }
    }

    /// Whether there are as many rows as kernels take, all of which see all slots.
    pub fn sees_all(step: *const Step) bool {
        return step.count == score.rows_max and !step.may_hide();
    }

    fn may_hide(step: *const Step) bool {
        return step.work.job.request.mask_kind != .none or !step.all_seen();
    }

    /// Rows from `first` on that see the same slots.
    fn alike(step: *const Step, first: usize) usize {
        if (step.work.job.request.mask_kind != .none) return 1;
        var rows: usize = 1;
        while (first + rows < step.count and
            step.first[first + rows] == step.first[first] and
            step.end[first + rows] == step.end[first]) rows += 1;
        return rows;
    }

    pub fn add_mass(step: *Step, top: []const f32, totals: []const f32) void {
        var args: softmax.MassArgs = .{
            .scores = step.scores,
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
            const entry = head * live + step.column();
            args.mass[r] = @intFromPtr(step.work.mass.?) +% offset(entry * 4);
        }
        step.work.job.table.add_mass(&args);
    }
};

/// A signed byte offset for wrapping addition to an address.
fn offset(bytes: i64) usize {
    return @truncate(@as(u64, @bitCast(bytes)));
}
