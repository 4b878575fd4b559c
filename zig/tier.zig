//! A tier: a run of consecutive positions in one pair of formats, held in pages of the pool. Page
//! n covers the positions from n * tokens_per_page on, in every kv head. Called by cache.zig
//! (which moves the bounds) and attend.zig (which reads); calls pool.zig.
const std = @import("std");
const assert = std.debug.assert;
const format = @import("format.zig");
const pool_file = @import("pool.zig");
const Half = format.Half;
const Pool = pool_file.Pool;

pub const Page = [*]align(64) u8;

pub const Tier = struct {
    key: Half,
    value: Half,
    heads: usize,
    /// Positions that a page covers; its halves have at least as many slots.
    tokens_per_page: u64,
    /// Positions held: [start, end).
    start: u64 = 0,
    end: u64 = 0,
    /// Number of the first page held.
    first_page: u64 = 0,
    /// (page, head), from `skipped` on
    pages: std.ArrayList(Page) = .empty,
    /// Entries of `pages` whose pages are gone; they are squeezed out now and then.
    skipped: usize = 0,

    pub fn deinit(tier: *Tier, gpa: std.mem.Allocator, pool: *Pool) void {
        for (tier.pages.items[tier.skipped..]) |page| pool.release_page(page, tier.page_bytes());
        tier.pages.deinit(gpa);
        tier.* = undefined;
    }

    pub fn tokens(tier: *const Tier) u64 {
        return tier.end - tier.start;
    }

    pub fn page_bytes(tier: *const Tier) usize {
        return tier.key.bytes() + tier.value.bytes();
    }

    pub fn page_count(tier: *const Tier) usize {
        return tier.pages.items.len - tier.skipped;
    }

    pub fn page_at(tier: *const Tier, number: u64, head: usize) Page {
        assert(number >= tier.first_page);
        return tier.pages.items[
            tier.skipped + @as(
                usize,
                @intCast(number - tier.first_page),
            ) * tier.heads + head
        ];
    }

    pub fn keys_of(_: *const Tier, page: Page) [*]u8 {
        return page;
    }

    pub fn values_of(tier: *const Tier, page: Page) [*]u8 {
        return page + tier.key.bytes();
    }

    fn numbers(tier: *const Tier, start: u64, end: u64) struct { first: u64, end: u64 } {
        if (start >= end) return .{ .first = 0, .end = 0 };
        return .{
            .first = start / tier.tokens_per_page,
            .end = (end - 1) / tier.tokens_per_page + 1,
        };
    }

    /// Gets everything that moving the bounds to [start, end) needs, without changing the tier.
    /// Pages that the move frees are counted on, so that a full pool still lets a window slide.
    pub fn reserve(tier: *Tier, gpa: std.mem.Allocator, pool: *Pool, start: u64, end: u64) !Change {
        const held = tier.numbers(tier.start, tier.end);
        const wanted = tier.numbers(start, end);
        const kept_first = @max(held.first, wanted.first);
        const kept_end = @max(kept_first, @min(held.end, wanted.end));
        const kept = kept_end - kept_first;
        const dropped = std.math.cast(
            usize,
            held.end - held.first - kept,
        ) orelse return error.OutOfMemory;
        const added = std.math.cast(
            usize,
            wanted.end - wanted.first - kept,
        ) orelse return error.OutOfMemory;
        var change: Change = .{
            .start = start,
            .end = end,
            .spare = &.{},
            .spare_len = 0,
            .added = added,
        };
        if (dropped == 0 and added == 0) return change;

        const places = std.math.mul(
            usize,
            dropped + added,
            tier.heads,
        ) catch return error.OutOfMemory;
        try tier.pages.ensureUnusedCapacity(gpa, added * tier.heads);
        change.spare = try gpa.alloc(Page, places);
        errdefer gpa.free(change.spare);
        const fresh = (added -| dropped) * tier.heads;
        try pool.acquire_pages(tier.page_bytes(), change.spare[0..fresh]);
        change.spare_len = fresh;
        return change;
    }

    /// Gives up a reservation.
    pub fn cancel(tier: *const Tier, gpa: std.mem.Allocator, pool: *Pool, change: *Change) void {
        for (change.spare[0..change.spare_len]) |page| pool.release_page(page, tier.page_bytes());
        gpa.free(change.spare);
        change.* = undefined;
    }

    /// Moves the bounds: pages outside them become spare, new ones come from the spare, zeroed.
    pub fn commit(tier: *Tier, gpa: std.mem.Allocator, pool: *Pool, change: *Change) void {
        tier.drop_outside(change);
        for (0..change.added * tier.heads) |_| {
            change.spare_len -= 1;
            const page = change.spare[change.spare_len];
            @memset(page[0..tier.page_bytes()], 0);
            tier.pages.appendAssumeCapacity(page);
        }
        tier.start = change.start;
        tier.end = change.end;
        if (tier.start == tier.end) assert(tier.page_count() == 0);
        tier.cancel(gpa, pool, change);
    }

    fn drop_outside(tier: *Tier, change: *Change) void {
        const held = tier.numbers(tier.start, tier.end);
        const wanted = tier.numbers(change.start, change.end);
        const front = @min(held.end, @max(held.first, wanted.first)) - held.first;
        const back = held.end - @max(held.first + front, @min(held.end, wanted.end));
        const list = &tier.pages;
        const front_len = @as(usize, @intCast(front)) * tier.heads;
        const back_len = @as(usize, @intCast(back)) * tier.heads;
        for (list.items[tier.skipped..][0..front_len]) |page| change.put(page);
        for (list.items[list.items.len - back_len ..]) |page| change.put(page);
        list.items.len -= back_len;
        tier.skipped += front_len;
        tier.first_page = if (tier.page_count() > 0) held.first + front else wanted.first;
        if (tier.skipped * 2 > list.items.len) tier.squeeze();
    }

    fn squeeze(tier: *Tier) void {
        const live = tier.pages.items[tier.skipped..];
        std.mem.copyForwards(Page, tier.pages.items[0..live.len], live);
        tier.pages.items.len = live.len;
        tier.skipped = 0;
    }

    /// Whether the page table is what the bounds say.
    pub fn consistent(tier: *const Tier) bool {
        if (tier.start > tier.end) return false;
        const wanted = tier.numbers(tier.start, tier.end);
        if (tier.page_count() != (wanted.end - wanted.first) * tier.heads) return false;
        return tier.start == tier.end or tier.first_page == wanted.first;
    }
};

/// A reserved move of a tier's bounds.
pub const Change = struct {
    start: u64,
    end: u64,
    /// Pages not in the tier, with room for those that it will give up.
    spare: []Page,
    spare_len: usize,
    added: usize,

    fn put(change: *Change, page: Page) void {
        change.spare[change.spare_len] = page;
        change.spare_len += 1;
    }
};

test "a tier slides, jumps, shrinks and empties without losing a page" {
    const gpa = std.testing.allocator;
    const pool = try Pool.create(gpa, .{});
    defer pool.release();
    const half: Half = .{ .format = .f16, .dim = 8, .slots = 16, .rotated = false };
    var tier: Tier = .{ .key = half, .value = half, .heads = 3, .tokens_per_page = 16 };
    defer tier.deinit(gpa, pool);
    const moves = [_][2]u64{ .{ 0, 5 }, .{ 0, 40 }, .{ 20, 90 }, .{ 20, 64 }, .{ 33, 34 }, .{
        500,
        600,
    }, .{ 600, 600 }, .{ 7, 9 } };
    for (moves) |move| {
        var change = try tier.reserve(gpa, pool, move[0], move[1]);
        tier.commit(gpa, pool, &change);
        try std.testing.expect(tier.consistent());
        try std.testing.expectEqual(
            tier.page_count() * tier.page_bytes(),
            pool.stats().bytes_in_use,
        );
    }
    var change = try tier.reserve(gpa, pool, 7, 200);
    tier.cancel(gpa, pool, &change);
    try std.testing.expect(tier.consistent());
}
