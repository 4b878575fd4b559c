//! Who leaves a cache that is full, or asked to: pins, evictions, and what they leave behind the
//! window (kept.zig). The rule: the oldest tokens go first, sinks and pinned ones never. Without
//! pins and evictions nothing of this is in use, and the window begins where cache.zig says.
//! Called by cache.zig, append.zig and abi_sequence.zig; calls kept.zig.
const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const kept_file = @import("kept.zig");
const message = @import("message.zig");
const Cache = @import("cache.zig").Cache;
const Config = @import("config.zig").Config;
const Kept = kept_file.Kept;
const Range = kept_file.Range;
const Ranges = kept_file.Ranges;
const Tier = @import("tier.zig").Tier;

const Error = error{ InvalidArgument, OutOfMemory };

/// What can be evicted, behind the window and in it: runs that are kept, then the body.
const Live = struct {
    ranges: Ranges,
    sources: std.ArrayList(*const Tier),

    fn init(cache: *const Cache) error{OutOfMemory}!Live {
        const gpa = cache.gpa;
        const runs = cache.kept_runs();
        var live: Live = .{ .ranges = .empty, .sources = .empty };
        errdefer live.deinit(gpa);
        try live.ranges.ensureTotalCapacity(gpa, runs.len + 1);
        try live.sources.ensureTotalCapacity(gpa, runs.len + 1);
        for (runs) |*run| live.add(run);
        const body = cache.body();
        if (body.start < body.end) live.add(body);
        return live;
    }

    fn add(live: *Live, tier: *const Tier) void {
        live.ranges.appendAssumeCapacity(.{ .start = tier.start, .end = tier.end });
        live.sources.appendAssumeCapacity(tier);
    }

    fn deinit(live: *Live, gpa: Allocator) void {
        live.ranges.deinit(gpa);
        live.sources.deinit(gpa);
    }
};

/// What is kept behind the window, and where the window begins.
pub const After = struct { begin: u64, kept: ?*Kept };

/// The state behind a window that makes room for `tokens` more; `begin` is where it begins if
/// nothing is kept. The result belongs to the caller.
pub fn after_append(cache: *const Cache, tokens: u64, begin: u64) error{OutOfMemory}!After {
    const kept = cache.kept orelse return .{ .begin = begin, .kept = null };
    const live_tokens = cache.len() + tokens;
    const max_tokens = cache.config.max_tokens;
    if (live_tokens <= max_tokens) return .{ .begin = cache.begin, .kept = kept.retain() };
    var live: Live = try .init(cache);
    defer live.deinit(cache.gpa);
    const excess = live_tokens - max_tokens;
    var gone = try kept_file.oldest(cache.gpa, live.ranges.items, kept.pins, excess);
    defer gone.deinit(cache.gpa);
    // The window begins behind the newest token that goes, if that is in it.
    const reached = gone.items[gone.items.len - 1].end;
    const begin_after = if (reached > cache.body().start) reached else cache.begin;
    return leave(cache, &live, gone.items, begin_after, kept.pins);
}

/// Takes `gone` out of what is live, and keeps what is left before `begin`: the end of `gone`, or
/// the present begin if all of it lies before that.
fn leave(
    cache: *const Cache,
    live: *const Live,
    gone: []const Range,
    begin: u64,
    pins: []const Range,
) error{OutOfMemory}!After {
    const gpa = cache.gpa;
    var rest = try kept_file.subtract(gpa, live.ranges.items, gone);
    defer rest.deinit(gpa);
    var count: usize = 0;
    while (count < rest.items.len and rest.items[count].start < begin) count += 1;
    const sources = live.sources.items;
    return .{
        .begin = begin,
        .kept = try .create(gpa, cache.pool, pins, rest.items[0..count], sources),
    };
}

/// Tokens that one append may bring so that those who leave for them are in the body before.
pub fn append_tokens_max(cache: *const Cache) u64 {
    const kept = cache.kept orelse return std.math.maxInt(u64);
    return room(&cache.config, kept.pins) orelse unreachable; // `pin` saw to it
}

/// Tokens that are neither sinks, pinned nor in the longest tail and warm tier; null if there would
/// be none.
pub fn room(config: *const Config, pins: []const Range) ?u64 {
    const sinks = config.sink_tokens;
    const pinned = kept_file.count_within(pins, sinks, std.math.maxInt(u64));
    const taken = sinks +| pinned +| config.recent_max();
    return if (taken < config.max_tokens) config.max_tokens - taken else null;
}

/// Pins [start, end): what of it is held is not evicted from now on, nor what is yet to come.
pub fn pin(cache: *Cache, range: Range) Error!void {
    cache.lock.lock();
    defer cache.lock.unlock();
    try check_range("pin", range);
    if (range.start == range.end) return;
    var held: u64 = 0;
    const past = @min(range.end, cache.next);
    for (0..cache.run_count()) |i| {
        const run = cache.run(i);
        if (run.start >= past or run.end <= range.start) continue;
        held += @min(run.end, past) - @max(run.start, range.start);
    }
    if (held < past -| range.start) {
        const text = "pin: {d} of the positions {d} to {d} were evicted";
        message.set(text, .{ past - range.start - held, range.start, range.end });
        return error.InvalidArgument;
    }
    var pins = try kept_file.unite(cache.gpa, pins_of(cache), range);
    defer pins.deinit(cache.gpa);
    if (room(&cache.config, pins.items) == null) {
        const text = "pin: {d} pinned tokens leave no room to evict any, beside sinks and tail, " ++
            "in max_tokens = {d}";
        const pinned = kept_file.count_within(pins.items, 0, std.math.maxInt(u64));
        message.set(text, .{ pinned, cache.config.max_tokens });
        return error.InvalidArgument;
    }
    try set_pins(cache, pins.items);
}

/// Lets [start, end) be evicted like other tokens.
pub fn unpin(cache: *Cache, range: Range) Error!void {
    cache.lock.lock();
    defer cache.lock.unlock();
    try check_range("unpin", range);
    var pins = try kept_file.subtract(cache.gpa, pins_of(cache), &.{range});
    defer pins.deinit(cache.gpa);
    try set_pins(cache, pins.items);
}

fn check_range(name: []const u8, range: Range) error{InvalidArgument}!void {
    if (range.start <= range.end and range.end <= std.math.maxInt(u48)) return;
    const text = "{s}: expected positions in order, below 2^48, got {d} to {d}";
    message.set(text, .{ name, range.start, range.end });
    return error.InvalidArgument;
}

pub fn pins_of(cache: *const Cache) []const Range {
    return if (cache.kept) |kept| kept.pins else &.{};
}

fn set_pins(cache: *Cache, pins: []const Range) error{OutOfMemory}!void {
    var live: Live = try .init(cache);
    defer live.deinit(cache.gpa);
    const runs = cache.kept_runs().len;
    const ranges = live.ranges.items[0..runs];
    const sources = live.sources.items[0..runs];
    cache.replace_kept(try .create(cache.gpa, cache.pool, pins, ranges, sources));
}

/// Evicts positions: of the store, or of all but the sinks where there is none; not pinned ones.
pub fn evict(cache: *Cache, gone: []const Range) Error!void {
    cache.lock.lock();
    defer cache.lock.unlock();
    var live: Live = try .init(cache);
    defer live.deinit(cache.gpa);
    const pins = pins_of(cache);
    var end_before: u64 = 0;
    for (gone) |range| {
        const whole = range.start >= end_before and range.start <= range.end and
            kept_file.count_within(live.ranges.items, range.start, range.end) ==
                range.end - range.start and
            kept_file.count_within(pins, range.start, range.end) == 0;
        if (!whole) {
            const text = "evict: not all of the positions {d} to {d} may be evicted, " ++
                "or they are out of order";
            message.set(text, .{ range.start, range.end });
            return error.InvalidArgument;
        }
        end_before = range.end;
    }
    if (gone.len == 0 or end_before == gone[0].start) return;

    // What is left of the body behind the newest token that goes is the window; it may be empty.
    const begin = if (end_before > cache.body().start) end_before else cache.begin;
    const after = try leave(cache, &live, gone, begin, pins);
    errdefer if (after.kept) |kept| kept.release(cache.gpa, cache.pool);
    const before = cache.len();
    cache.move(.{
        .next = cache.next,
        .begin = begin,
        .boundary = cache.boundary,
        .cold = cache.cold,
    }) catch return error.OutOfMemory; // nothing is added, so no pool is full
    cache.replace_kept(after.kept);
    cache.evicted += before - cache.len();
}

/// What is kept when the tokens from position `length` on are taken back.
pub fn after_cut(cache: *const Cache, length: u64) error{OutOfMemory}!?*Kept {
    const kept = cache.kept orelse return null;
    const runs = cache.kept_runs();
    if (runs.len == 0 or runs[runs.len - 1].end <= length) return kept.retain();
    var live: Live = try .init(cache);
    defer live.deinit(cache.gpa);
    var count: usize = 0;
    while (count < runs.len and runs[count].start < length) count += 1;
    const ranges = live.ranges.items[0..count];
    if (count > 0) ranges[count - 1].end = @min(ranges[count - 1].end, length);
    return .create(cache.gpa, cache.pool, kept.pins, ranges, live.sources.items[0..count]);
}
