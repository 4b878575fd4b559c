//! Tests of tier.zig: bounds that move, rows that are shared, a pool that is full.
const std = @import("std");
const Ahead = @import("ahead.zig").Ahead;
const Half = @import("format.zig").Half;
const Pool = @import("pool.zig").Pool;
const Tier = @import("tier.zig").Tier;
const window_file = @import("window.zig");
const Place = window_file.Place;
const Route = window_file.Route;
const Window = window_file.Window;

/// Moves the bounds at once, for tests.
fn move(tier: *Tier, pool: *Pool, start: u64, end: u64) !void {
    const gpa = std.testing.allocator;
    const written = @max(start, tier.end);
    var change = try tier.reserve(gpa, pool, start, end, written);
    tier.commit(gpa, pool, &change);
    for (@intCast(@min(written, end))..@intCast(end)) |position| for (0..tier.heads) |head| {
        const page = tier.page_at(position / tier.tokens_per_page, head);
        page[position % tier.tokens_per_page] = stamp(position);
    };
    try std.testing.expect(tier.consistent());
}

fn stamp(position: usize) u8 {
    return @truncate(position *% 7 +% 1);
}

fn expect_stamps(tier: *const Tier) !void {
    for (@intCast(tier.start)..@intCast(tier.end)) |position| for (0..tier.heads) |head| {
        const page = tier.page_at(position / tier.tokens_per_page, head);
        try std.testing.expectEqual(stamp(position), page[position % tier.tokens_per_page]);
    };
}

const test_half: Half = .{ .format = .f16, .dim = 8, .slots = 16, .rotated = false };
const test_tier: Tier = .{
    .key = test_half,
    .value = test_half,
    .heads = 3,
    .tokens_per_page = 16,
};

test "a tier slides, jumps, shrinks and empties without losing a page" {
    const gpa = std.testing.allocator;
    const pool = try Pool.create(gpa, .{});
    defer pool.release();
    var tier = test_tier;
    defer tier.deinit(gpa, pool);
    const moves = [_][2]u64{
        .{ 0, 5 },   .{ 0, 40 },    .{ 20, 90 },   .{ 20, 64 },
        .{ 33, 34 }, .{ 500, 600 }, .{ 600, 600 }, .{ 7, 9 },
    };
    for (moves) |bounds| {
        try move(&tier, pool, bounds[0], bounds[1]);
        try std.testing.expectEqual(
            tier.page_count() * tier.page_bytes(),
            pool.stats().bytes_in_use,
        );
    }
    var change = try tier.reserve(gpa, pool, 7, 200, 9);
    tier.cancel(gpa, pool, &change);
    try std.testing.expect(tier.consistent());
}

test "what a window fetches ahead lies within one page" {
    const gpa = std.testing.allocator;
    const pool = try Pool.create(gpa, .{});
    defer pool.release();
    const shapes = [_]struct { slots: u32, dim: u32 }{
        .{ .slots = 80, .dim = 32 },
        .{ .slots = 80, .dim = 64 },
        .{ .slots = 64, .dim = 32 },
        .{ .slots = 16, .dim = 64 },
    };
    for (shapes) |shape| {
        const half: Half = .{
            .format = .f16,
            .dim = shape.dim,
            .slots = shape.slots,
            .rotated = false,
        };
        var tier: Tier = .{
            .key = half,
            .value = half,
            .heads = 2,
            .tokens_per_page = shape.slots,
        };
        defer tier.deinit(gpa, pool);
        try move(&tier, pool, 0, 3 * shape.slots);
        for (0..tier.heads) |head| {
            const after: Place = .{ .tier = &tier, .position = 0, .head = 1 - head };
            const route: Route = .init(&tier, head, tier.end, after);
            var position: u64 = 0;
            while (position < tier.end) {
                var window: Window = undefined;
                window.start(&route, position, .{
                    .start = 0,
                    .end = tier.end,
                    .start_for_all = 0,
                    .end_for_all = tier.end,
                });
                try std.testing.expect(window.ahead_of_score.lines > 0);
                for ([_]Ahead{
                    window.ahead_of_score,
                    window.ahead_of_update,
                    window.ahead_of_accumulate,
                }) |ahead| try std.testing.expect(within_a_page(&tier, ahead));
                position = window.end;
            }
        }
    }
}

fn within_a_page(tier: *const Tier, ahead: Ahead) bool {
    const first = @intFromPtr(ahead.at);
    for (0..tier.page_count() / tier.heads) |number| for (0..tier.heads) |head| {
        const page = @intFromPtr(tier.page_at(number, head));
        if (first >= page and first + ahead.lines * 64 <= page + tier.page_bytes()) return true;
    };
    return false;
}

test "the first to append to a shared row writes in place, the next copies that row alone" {
    const gpa = std.testing.allocator;
    const pool = try Pool.create(gpa, .{});
    defer pool.release();
    var a = test_tier;
    defer a.deinit(gpa, pool);
    try move(&a, pool, 0, 40);
    const row_bytes = 3 * a.page_bytes();
    var b = a.share();
    defer b.deinit(gpa, pool);
    try std.testing.expectEqual(3 * row_bytes, pool.stats().bytes_in_use);

    try move(&b, pool, 0, 43);
    try std.testing.expectEqual(3 * row_bytes, pool.stats().bytes_in_use);
    try move(&a, pool, 0, 42);
    try std.testing.expectEqual(4 * row_bytes, pool.stats().bytes_in_use);
    try move(&b, pool, 20, 41);
    try move(&b, pool, 20, 70);
    try expect_stamps(&a);
    try expect_stamps(&b);

    // What a cancelled reservation claimed is free again.
    var c = a.share();
    defer c.deinit(gpa, pool);
    var change = try a.reserve(gpa, pool, 0, 45, 42);
    a.cancel(gpa, pool, &change);
    const before = pool.stats().bytes_in_use;
    try move(&c, pool, 0, 48);
    try std.testing.expectEqual(before, pool.stats().bytes_in_use);
}

test "a full pool refuses a copy and nothing has changed" {
    const gpa = std.testing.allocator;
    const row_bytes = 3 * test_tier.page_bytes();
    const pool = try Pool.create(gpa, .{ .max_bytes = 3 * row_bytes });
    defer pool.release();
    var a = test_tier;
    defer a.deinit(gpa, pool);
    try move(&a, pool, 0, 40);
    var b = a.share();
    try move(&b, pool, 0, 44);
    try std.testing.expectError(error.PoolExhausted, a.reserve(gpa, pool, 0, 41, 40));
    try expect_stamps(&b);
    b.deinit(gpa, pool);
    try move(&a, pool, 0, 41);
    try expect_stamps(&a);
}
