//! Changes what a cache is made of while it holds tokens: other precisions, other lengths of tail
//! and warm tier. The law: every token goes where the rules of the new configuration put it in a
//! stream of this length; if its format there is the one it had, it keeps its bits, else it is
//! decoded and encoded anew. Tokens behind the window stay with the store.
//!
//! All pages are there before anything is given up. Rows of a tier that keeps its format are
//! shared, not copied, unless it grows at its front. Called by abi_policy.zig; calls tier.zig,
//! recode.zig.
const std = @import("std");
const assert = std.debug.assert;
const append_file = @import("append.zig");
const cache_file = @import("cache.zig");
const encode = @import("encode.zig");
const evict = @import("evict.zig");
const fill = @import("fill.zig");
const format = @import("format.zig");
const message = @import("message.zig");
const recode = @import("recode.zig");
const rotate = @import("rotate.zig");
const snapshot_kept = @import("snapshot_kept.zig");
const spill = @import("spill.zig");
const threads = @import("threads.zig");
const Cache = cache_file.Cache;
const Config = @import("config.zig").Config;
const Half = format.Half;
const Range = @import("kept.zig").Range;
const Side = format.Side;
const Tier = @import("tier.zig").Tier;

pub const Error = append_file.Error;

/// Makes the cache one of `config`, with all its tokens, or changes nothing.
pub fn convert(cache: *Cache, config: Config) Error!void {
    try cache.verify();
    cache.lock.lock();
    defer cache.lock.unlock();
    try check(cache, &config);
    try rebuild(cache, config);
}

fn check(cache: *const Cache, config: *const Config) error{InvalidArgument}!void {
    var expected = cache.config;
    inline for (.{
        "tail_length", "tail_format", "key_format", "value_format",
        "warm_length", "warm_format", "rotation",
    }) |name| @field(expected, name) = @field(config, name);
    if (!std.meta.eql(expected, config.*)) {
        const text = "config: expected one that differs in formats, tail_length or warm_length";
        message.set(text, .{});
        return error.InvalidArgument;
    }
    if (evict.room(config, evict.pins_of(cache)) != null) return;
    const text = "config: pinned tokens, sinks, tail and warm tier would leave no room to evict " ++
        "any, in max_tokens = {d}";
    message.set(text, .{config.max_tokens});
    return error.InvalidArgument;
}

fn alike(one: *const Tier, other: *const Tier) bool {
    return std.meta.eql(one.key, other.key) and std.meta.eql(one.value, other.value);
}

fn rebuild(cache: *Cache, config: Config) Error!void {
    const fresh = try Cache.create(cache.gpa, cache.pool, config);
    defer fresh.destroy();
    while (true) {
        open(cache, fresh) catch |err| {
            fresh.drop_contents();
            fresh.tiers = config.tiers();
            const moved = err == error.PoolExhausted and try spill.make_room(cache);
            if (moved) continue;
            return err;
        };
        break;
    }
    try write(cache, fresh);
    fresh.evicted = cache.evicted;
    const left = fresh.tier_of(.warm).end;
    fresh.migrated = cache.migrated + (left -| cache.tier_of(.warm).end);
    if (cache.mapping) |mapping| fresh.mapping = mapping.retain();

    cache.drop_contents();
    cache.take_from(fresh);
    cache.config = config;
    cache.key_limit = fresh.key_limit;
    cache.value_limit = fresh.value_limit;
    std.mem.swap(@TypeOf(cache.rows), &cache.rows, &fresh.rows);
    // What was taken is not to be given up with the rest.
    fresh.tiers = config.tiers();
    fresh.kept = null;
    fresh.mapping = null;
}

/// Gives `fresh` its bounds, and pages for all tokens that have to be written.
fn open(cache: *const Cache, fresh: *Cache) Error!void {
    const gpa = cache.gpa;
    const config = &fresh.config;
    const rule = Cache.rule_at(config, cache.next);
    // What eviction has passed is of the store, whatever the rule says.
    const passed = if (cache.begin > config.sink_tokens) cache.begin else 0;
    const cold = if (config.kind == .pooled) 0 else @max(rule.cold, passed);
    fresh.next = cache.next;
    fresh.begin = cache.begin;
    fresh.cold = cold;
    fresh.boundary = @max(rule.boundary, cold);
    const bounds = fresh.bounds(.{
        .next = fresh.next,
        .begin = fresh.begin,
        .boundary = fresh.boundary,
        .cold = fresh.cold,
    });
    for (&fresh.tiers, &cache.tiers, bounds) |*tier, *old, bound| {
        const start, const end = bound;
        const shared_end = @min(end, old.end);
        if (!alike(tier, old) or start < old.start or start >= shared_end) {
            try tier.open(gpa, cache.pool, start, end, null, &.{});
            continue;
        }
        tier.* = try old.part(gpa, cache.pool, start, shared_end);
        var change = try tier.reserve(gpa, cache.pool, start, end, shared_end);
        tier.commit(gpa, cache.pool, &change);
    }
    const kept = cache.kept orelse return;
    if (alike(fresh.body(), cache.body())) {
        fresh.kept = kept.retain();
        return;
    }
    const ranges = try gpa.alloc(Range, kept.runs.len);
    defer gpa.free(ranges);
    for (ranges, kept.runs) |*range, *run| range.* = .{ .start = run.start, .end = run.end };
    var empty = fresh.*;
    empty.tiers = config.tiers();
    fresh.kept = try snapshot_kept.open(&empty, kept.pins, ranges, null, &.{});
}

/// Writes what is not shared, all heads at once.
fn write(cache: *Cache, fresh: *Cache) Error!void {
    const config = &fresh.config;
    const dims = config.head_dim + config.value_dim;
    const values = cache.len() *| config.num_kv_heads *| dims;
    var workspace: fill.Workspace = try .init(fresh.rows, values);
    defer workspace.deinit();
    var job: Job = .{ .cache = cache, .fresh = fresh, .workspace = &workspace };
    if (workspace.lanes.count > 1) {
        threads.run(config.num_kv_heads, &job, Job.write_head);
    } else for (0..config.num_kv_heads) |head| Job.write_head(&job, @intCast(head));
    for (0..cache.run_count()) |i| {
        const run = cache.run(i);
        spill.leave_all(run, run.start, run.end);
    }
    const position = job.refused.load(.monotonic);
    if (position == Job.none) return;
    message.set("the token at position {d} holds a value that the new precisions cannot", .{
        position,
    });
    return error.NotRepresentable;
}

const Job = struct {
    cache: *const Cache,
    fresh: *Cache,
    workspace: *fill.Workspace,
    /// The first position of which a value does not fit.
    refused: std.atomic.Value(usize) = .init(none),

    const none = std.math.maxInt(usize);

    /// Consecutive tokens of one head within one page, and the run that held them.
    const Piece = struct {
        from: *const Tier,
        to: *const Tier,
        head: usize,
        start: u64,
        count: usize,
    };

    fn write_head(context: *anyopaque, head: u32) void {
        const job: *Job = @ptrCast(@alignCast(context));
        const lane = job.workspace.lanes.take();
        defer job.workspace.lanes.give(lane);
        const rows = job.workspace.lanes.memory(lane);
        for (0..job.fresh.run_count()) |i| {
            const to = job.fresh.run(i);
            for (0..job.cache.run_count()) |k| {
                const from = job.cache.run(k);
                const end = @min(from.end, to.end);
                var position = @max(from.start, to.start);
                while (position < end) {
                    const page_end = (position / to.tokens_per_page + 1) * to.tokens_per_page;
                    const count: usize = @intCast(@min(page_end, end) - position);
                    const piece: Piece = .{
                        .from = from,
                        .to = to,
                        .head = head,
                        .start = position,
                        .count = count,
                    };
                    job.write_half(.key, &piece, rows);
                    job.write_half(.value, &piece, rows);
                    position += count;
                }
            }
        }
    }

    fn write_half(job: *Job, comptime side: Side, piece: *const Piece, rows: []f32) void {
        const number = piece.start / piece.to.tokens_per_page;
        assert(piece.from.tokens_per_page == piece.to.tokens_per_page);
        const slot: usize = @intCast(piece.start % piece.to.tokens_per_page);
        const from = piece.from.half(side);
        const to = piece.to.half(side);
        const source = piece.from.half_at(side, number, piece.head);
        const target = piece.to.half_at(side, number, piece.head);
        const stays = std.meta.eql(from, to);
        const limit = if (side == .key) job.fresh.key_limit else job.fresh.value_limit;
        if (!stays or job.goes_on(piece.to)) for (slot..slot + piece.count) |s| {
            if (fits(from, side, source, s, limit, rows)) continue;
            _ = job.refused.fetchMin(@intCast(piece.start + s - slot), .monotonic);
            return;
        };
        if (source == target) return; // the row is shared
        const first = @max(piece.to.start, piece.start - slot);
        if (side == .key and piece.start == first) job.give_offsets(piece, target, rows);
        if (stays) {
            const bytes = target[0..to.bytes()];
            for (slot..slot + piece.count) |s| recode.copy(to, side, source, bytes, s);
        } else {
            recode.decode(from, side, source, slot, piece.count, rows.ptr);
            recode.change_space(from, to, piece.count, rows.ptr);
            recode.encode(to, side, target, slot, piece.count, rows.ptr);
        }
    }

    /// Keys that keep their bits keep the offset of their page. Where a page of them is new, or
    /// all are encoded anew, it is that of all the tokens in it, also of those that are kept.
    fn give_offsets(job: *Job, piece: *const Piece, target: [*]u8, rows: []f32) void {
        const half = piece.to.key;
        if (!half.centred) return;
        const size = piece.to.tokens_per_page;
        const page: Range = .{
            .start = piece.start / size * size,
            .end = (piece.start / size + 1) * size,
        };
        const number = piece.start / size;
        const dim = half.dim_stored();
        if (std.meta.eql(half, job.cache.body().key)) {
            for (1..job.cache.kept_runs().len + 2) |i| {
                const run = job.cache.run(i);
                if (run.start >= page.end or run.end <= page.start or run.tokens() == 0) continue;
                const offsets = half.offsets(run.half_at(.key, number, piece.head));
                return @memcpy(@constCast(half.offsets(target))[0..dim], offsets[0..dim]);
            }
        }
        var count: usize = 0;
        for (1..job.fresh.kept_runs().len + 2) |i| {
            const to = job.fresh.run(i);
            for (0..job.cache.run_count()) |k| {
                const from = job.cache.run(k);
                const start = @max(page.start, @max(from.start, to.start));
                const end = @min(page.end, @min(from.end, to.end));
                if (start >= end) continue;
                const source = from.half_at(.key, number, piece.head);
                const tokens: usize = @intCast(end - start);
                const slot: usize = @intCast(start - page.start);
                const new = rows[count * dim ..].ptr;
                recode.decode(from.key, .key, source, slot, tokens, new);
                recode.change_space(from.key, half, tokens, new);
                count += tokens;
            }
        }
        recode.set_offsets(half, target, count, rows.ptr);
    }

    /// Whether tokens of this tier have others before them.
    fn goes_on(job: *const Job, tier: *const Tier) bool {
        return tier == job.fresh.tier_of(.warm) or tier == job.fresh.tier_of(.tail);
    }

    /// Whether a token's values are among those that an append to the new cache would take.
    fn fits(
        half: Half,
        comptime side: Side,
        source: [*]const u8,
        slot: usize,
        limit: f32,
        rows: []f32,
    ) bool {
        const row = rows[0..half.dim_stored()];
        encode.decode_token(half, side, source, slot, row);
        if (half.rotated) rotate.rotate(row);
        for (row[0..half.dim]) |x| if (!(@abs(x) <= limit)) return false;
        return true;
    }
};
