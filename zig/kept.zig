//! What stays behind a window that moves on: tokens in pinned ranges, which eviction skips, and
//! those that an explicit eviction spared. They are runs of positions, each a tier of its own that
//! shares the rows in which its tokens have been all along; nothing of them is moved or written.
//!
//! A `Kept` never changes: a cache that evicts, pins or trims makes another one. So forks share it.
//! Called by cache.zig and append.zig; calls tier.zig.
const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const Pool = @import("pool.zig").Pool;
const Tier = @import("tier.zig").Tier;

/// Positions [start, end).
pub const Range = extern struct { start: u64, end: u64 };

pub const Ranges = std.ArrayList(Range);

pub const Kept = struct {
    references: std.atomic.Value(u32) = .init(1),
    /// In order, apart from each other.
    pins: []const Range,
    /// In order; all end at or before the begin of the window.
    runs: []Tier,

    pub fn retain(kept: *Kept) *Kept {
        const before = kept.references.fetchAdd(1, .monotonic);
        assert(before > 0);
        return kept;
    }

    pub fn release(kept: *Kept, gpa: Allocator, pool: *Pool) void {
        const before = kept.references.fetchSub(1, .acq_rel);
        assert(before > 0);
        if (before > 1) return;
        for (kept.runs) |*run| run.deinit(gpa, pool);
        gpa.free(kept.runs);
        gpa.free(kept.pins);
        gpa.destroy(kept);
    }

    /// With these pins, and a run for each of `ranges`, each of which lies in one of `sources`, all
    /// in order. Null if there is nothing to keep.
    pub fn create(
        gpa: Allocator,
        pool: *Pool,
        pins: []const Range,
        ranges: []const Range,
        sources: []const *const Tier,
    ) error{OutOfMemory}!?*Kept {
        if (pins.len == 0 and ranges.len == 0) return null;
        const kept = try gpa.create(Kept);
        errdefer gpa.destroy(kept);
        const own_pins = try gpa.dupe(Range, pins);
        errdefer gpa.free(own_pins);
        const runs = try gpa.alloc(Tier, ranges.len);
        errdefer gpa.free(runs);
        var made: usize = 0;
        errdefer for (runs[0..made]) |*run| run.deinit(gpa, pool);
        var source: usize = 0;
        for (ranges, runs) |range, *run| {
            while (sources[source].end <= range.start) source += 1;
            run.* = try sources[source].part(gpa, pool, range.start, range.end);
            made += 1;
        }
        kept.* = .{ .pins = own_pins, .runs = runs };
        return kept;
    }
};

/// Adds [start, end) to ranges that are in order, and joins it to its neighbours.
pub fn unite(gpa: Allocator, ranges: []const Range, add: Range) error{OutOfMemory}!Ranges {
    var out: Ranges = try .initCapacity(gpa, ranges.len + 1);
    var joined = add;
    for (ranges) |range| {
        if (range.end < joined.start) {
            out.appendAssumeCapacity(range);
        } else if (range.start <= joined.end) {
            joined.start = @min(joined.start, range.start);
            joined.end = @max(joined.end, range.end);
        }
    }
    if (joined.start < joined.end) out.appendAssumeCapacity(joined);
    for (ranges) |range| {
        if (range.start > joined.end) out.appendAssumeCapacity(range);
    }
    return out;
}

/// Takes ranges, in order, out of others.
pub fn subtract(
    gpa: Allocator,
    ranges: []const Range,
    gone: []const Range,
) error{OutOfMemory}!Ranges {
    var out: Ranges = try .initCapacity(gpa, ranges.len + gone.len);
    for (ranges) |range| {
        var start = range.start;
        for (gone[first_after(gone, start)..]) |hole| {
            if (hole.start >= range.end) break;
            if (hole.start > start) {
                out.appendAssumeCapacity(.{ .start = start, .end = hole.start });
            }
            start = @max(start, hole.end);
        }
        if (start < range.end) out.appendAssumeCapacity(.{ .start = start, .end = range.end });
    }
    return out;
}

/// Index of the first range that ends after `position`.
fn first_after(ranges: []const Range, position: u64) usize {
    var low: usize = 0;
    var high = ranges.len;
    while (low < high) {
        const middle = low + (high - low) / 2;
        if (ranges[middle].end <= position) low = middle + 1 else high = middle;
    }
    return low;
}

/// Tokens of `ranges` that lie in [start, end).
pub fn count_within(ranges: []const Range, start: u64, end: u64) u64 {
    var count: u64 = 0;
    for (ranges[first_after(ranges, start)..]) |range| {
        if (range.start >= end) break;
        count += @min(range.end, end) - @max(range.start, start);
    }
    return count;
}

/// The oldest `count` positions of `live` that are not in `pins`, as ranges.
pub fn oldest(
    gpa: Allocator,
    live: []const Range,
    pins: []const Range,
    count: u64,
) error{OutOfMemory}!Ranges {
    var loose = try subtract(gpa, live, pins);
    var rest = count;
    for (loose.items, 0..) |*range, i| {
        const taken = @min(rest, range.end - range.start);
        range.end = range.start + taken;
        rest -= taken;
        if (rest == 0) {
            loose.items.len = i + 1;
            break;
        }
    }
    assert(rest == 0); // cache.zig keeps enough of them
    return loose;
}

test "ranges: unite, subtract, count and take the oldest, against single positions" {
    const gpa = std.testing.allocator;
    var random = std.Random.DefaultPrng.init(0);
    for (0..300) |_| {
        var sets: [2]std.StaticBitSet(64) = .{ .empty, .empty };
        var lists: [2]Ranges = .{ .empty, .empty };
        defer for (&lists) |*list| list.deinit(gpa);
        for (&sets, &lists) |*set, *list| for (0..random.random().uintLessThan(usize, 5)) |_| {
            const start = random.random().uintLessThan(u64, 60);
            const end = start + random.random().uintLessThan(u64, 64 - start) / 4;
            set.setRangeValue(.{ .start = @intCast(start), .end = @intCast(end) }, true);
            const joined = try unite(gpa, list.items, .{ .start = start, .end = end });
            list.deinit(gpa);
            list.* = joined;
            try expect_same(set.*, list.items);
        };
        var difference = try subtract(gpa, lists[0].items, lists[1].items);
        defer difference.deinit(gpa);
        const left = sets[0].differenceWith(sets[1]);
        try expect_same(left, difference.items);
        try std.testing.expectEqual(left.count(), count_within(difference.items, 0, 64));
        if (left.count() == 0) continue;
        const wanted = 1 + random.random().uintLessThan(usize, left.count());
        var old = try oldest(gpa, lists[0].items, lists[1].items, wanted);
        defer old.deinit(gpa);
        var expected: std.StaticBitSet(64) = .empty;
        var members = left.iterator(.{});
        for (0..wanted) |_| expected.set(members.next().?);
        try expect_same(expected, old.items);
    }
}

fn expect_same(set: std.StaticBitSet(64), ranges: []const Range) !void {
    var got: std.StaticBitSet(64) = .empty;
    var end: u64 = 0;
    for (ranges, 0..) |range, i| {
        try std.testing.expect(range.start < range.end and (i == 0 or range.start >= end));
        end = range.end;
        got.setRangeValue(.{ .start = @intCast(range.start), .end = @intCast(range.end) }, true);
    }
    try std.testing.expect(got.eql(set));
}
