//! Tests of pool.zig: a random walk with a sentinel in every live buffer, the limit, failing
//! memory, addresses that are not ours, several threads.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const expect = std.testing.expect;
const expectEqual = std.testing.expectEqual;
const expectError = std.testing.expectError;
const pool_file = @import("pool.zig");
const Pool = pool_file.Pool;
const Page = pool_file.Page;
const Source = @import("slab.zig").Source;

const Buffer = []align(64) u8;

const gpa = std.testing.allocator;
const kb = 1 << 10;

/// What the counters say is what the slabs hold.
fn check(pool: *Pool) void {
    pool.mutex.lock();
    defer pool.mutex.unlock();
    var held_bytes: u64 = 0;
    var reserved_bytes: u64 = 0;
    var end: usize = 0;
    for (pool.slabs.items) |slab| {
        assert(@intFromPtr(slab.memory.ptr) >= end);
        end = @intFromPtr(slab.memory.ptr) + slab.memory.len;
        assert(slab.slots_out > 0);
        assert(slab.slot_bytes == pool.classes.items[slab.class_index].slot_bytes);
        held_bytes += slab.slots_out * slab.slot_bytes;
        reserved_bytes += slab.memory.len;
    }
    var free_bytes: u64 = 0;
    for (pool.classes.items) |class| free_bytes += class.idle.items.len * class.slot_bytes;
    const counters = pool.counters;
    assert(counters.bytes_free == free_bytes);
    assert(counters.bytes_in_use + counters.bytes_free == held_bytes);
    assert(counters.bytes_reserved == reserved_bytes);
    assert(counters.bytes_high_water >= counters.bytes_in_use);
    const max_bytes = pool.options.max_bytes;
    if (max_bytes > 0) assert(counters.bytes_in_use + counters.bytes_free <= max_bytes);
}

/// Holds buffers and pages of many sizes, each filled with a word nobody else has.
const Walk = struct {
    const Live = struct { pointer: Page, bytes: usize, is_page: bool, sentinel: u64 };

    pool: *Pool,
    random: std.Random,
    live: std.ArrayList(Live) = .empty,
    live_bytes: u64 = 0,
    sentinel: u64,

    const sizes = [_]usize{
        1,    63,   64,   65,     1024,    1025,
        4096, 4352, 9000, 65_536, 300_000, 2_500_000,
    };

    fn grow(walk: *Walk) !void {
        const bytes = sizes[walk.random.uintLessThan(usize, sizes.len)];
        if (walk.random.boolean()) {
            const buffer = try walk.pool.acquire(bytes);
            try expectEqual(try pool_file.class_bytes(bytes), buffer.len);
            try walk.add(buffer.ptr, buffer.len, false);
        } else {
            var pages: [7]Page = undefined;
            const count = walk.random.intRangeAtMost(usize, 1, if (bytes < kb) pages.len else 2);
            try walk.pool.acquire_pages(bytes, pages[0..count]);
            const page_bytes = try pool_file.page_bytes(bytes);
            for (pages[0..count]) |page| try walk.add(page, page_bytes, true);
        }
    }

    fn add(walk: *Walk, pointer: Page, bytes: usize, is_page: bool) !void {
        try expect(@intFromPtr(pointer) % 64 == 0);
        walk.sentinel += 1;
        @memset(words(pointer, bytes), walk.sentinel);
        walk.live_bytes += bytes;
        const live: Live = .{
            .pointer = pointer,
            .bytes = bytes,
            .is_page = is_page,
            .sentinel = walk.sentinel,
        };
        try walk.live.append(gpa, live);
    }

    fn shrink(walk: *Walk) !void {
        if (walk.live.items.len == 0) return;
        const index = walk.random.uintLessThan(usize, walk.live.items.len);
        const live = walk.live.swapRemove(index);
        for (words(live.pointer, live.bytes)) |word| {
            if (word != live.sentinel) return error.SentinelOverwritten;
        }
        walk.live_bytes -= live.bytes;
        if (live.is_page) {
            try expectError(error.ForeignBuffer, walk.pool.release_buffer(live.pointer));
            walk.pool.release_page(live.pointer, live.bytes);
        } else {
            try walk.pool.release_buffer(live.pointer);
        }
    }

    fn run(walk: *Walk, steps: usize, grow_percent: u8) !void {
        for (0..steps) |_| {
            if (walk.random.uintLessThan(u8, 100) < grow_percent) {
                walk.grow() catch |err| switch (err) {
                    error.PoolExhausted => try walk.shrink(),
                    else => return err,
                };
            } else try walk.shrink();
        }
    }

    fn deinit(walk: *Walk) void {
        while (walk.live.items.len > 0) walk.shrink() catch unreachable;
        walk.live.deinit(gpa);
    }

    /// A few words, spread out, are enough to notice a neighbour, and keep the test fast.
    fn words(pointer: Page, bytes: usize) []u64 {
        const all: [*]u64 = @ptrCast(pointer);
        return all[0 .. @min(bytes, 16 * kb) / 8];
    }
};

fn walk_once(options: pool_file.Options, seed: u64) !void {
    const pool = try Pool.create(gpa, options);
    defer pool.release();
    var prng: std.Random.DefaultPrng = .init(seed);
    var walk: Walk = .{ .pool = pool, .random = prng.random(), .sentinel = seed << 32 };
    for ([_]u8{ 65, 30, 80, 20 }) |grow_percent| {
        try walk.run(400, grow_percent);
        check(pool);
        try expectEqual(walk.live_bytes, pool.stats().bytes_in_use);
    }
    walk.deinit();
    check(pool);
    pool.clear();
    const stats = pool.stats();
    try expectEqual(0, stats.bytes_in_use + stats.bytes_free + stats.bytes_reserved);
    try expectEqual(stats.misses, stats.allocations);
}

test "pool: no buffer overlaps another, and all memory goes back" {
    try walk_once(.{}, 1);
    try walk_once(.{ .max_free_per_class = 0 }, 2);
    try walk_once(.{ .max_free_per_class = 3, .max_bytes = 40 << 20, .zero_on_release = true }, 3);
    try walk_once(.{ .max_bytes = 5 << 20 }, 4);
}

test "pool: sizes" {
    for ([_][2]u64{
        .{ 0, kb },                .{ 1, kb },               .{ kb, kb },
        .{ kb + 1, 4 * kb },       .{ 4 * kb + 1, 16 * kb }, .{ 64 * kb, 64 * kb },
        .{ 64 * kb + 1, 1 << 18 }, .{ 1 << 18, 1 << 18 },    .{ (1 << 18) + 1, (1 << 18) + 4096 },
    }) |row| try expectEqual(row[1], try pool_file.class_bytes(row[0]));
    const max = pool_file.buffer_bytes_max;
    for ([_]u64{ max + 1, 1 << 63, std.math.maxInt(u64) - 4095, std.math.maxInt(u64) }) |bytes| {
        try expectError(error.OutOfMemory, pool_file.class_bytes(bytes));
    }
    const pool = try Pool.create(gpa, .{ .max_bytes = std.math.maxInt(u64) });
    defer pool.release();
    try expectError(error.OutOfMemory, pool.acquire(std.math.maxInt(u64)));
    try expectError(error.OutOfMemory, pool.acquire_page(std.math.maxInt(usize)));
    try expectEqual(0, pool.stats().misses);
}

test "pool: addresses that are not ours, and second releases, are refused" {
    const pool = try Pool.create(gpa, .{});
    defer pool.release();
    const other = try Pool.create(gpa, .{});
    defer other.release();
    const buffer = try pool.acquire(5000);
    const strange = try other.acquire(5000);
    var local: u64 = 0;
    const refused = [_]?*const anyopaque{
        null,           &local,                              strange.ptr,
        buffer.ptr + 1, buffer.ptr + 64,                     buffer.ptr + buffer.len,
        @ptrFromInt(1), @ptrFromInt(std.math.maxInt(usize)),
    };
    for (refused) |pointer| try expectError(error.ForeignBuffer, pool.release_buffer(pointer));
    try pool.release_buffer(buffer.ptr);
    try expectError(error.ForeignBuffer, pool.release_buffer(buffer.ptr));
    pool.clear(); // now the address belongs to nobody
    try expectError(error.ForeignBuffer, pool.release_buffer(buffer.ptr));
    try other.release_buffer(strange.ptr);
    check(pool);
}

test "pool: counters" {
    const pool = try Pool.create(gpa, .{ .max_free_per_class = 2 });
    defer pool.release();
    try pool.prewarm(16 * kb, 2);
    try pool.prewarm(16 * kb, 5); // the list is full
    try expectEqual(2, pool.stats().allocations);
    try expectEqual(0, pool.stats().returns + pool.stats().misses + pool.stats().drops);
    try expectEqual(2, pool.stats().free_16k);

    var buffers: [4]Buffer = undefined;
    for (&buffers) |*buffer| buffer.* = try pool.acquire(16 * kb);
    const page = try pool.acquire_page(4352);
    for (buffers[0..3]) |buffer| try pool.release_buffer(buffer.ptr);
    pool.release_page(page, 4352);

    const stats = pool.stats();
    try expectEqual(2, stats.hits);
    try expectEqual(3, stats.misses);
    try expectEqual(5, stats.allocations);
    try expectEqual(3, stats.returns);
    try expectEqual(1, stats.drops);
    try expectEqual(1, stats.free_pages);
    try expectEqual(16 * kb, stats.bytes_in_use);
    try expectEqual(2 * 16 * kb + 4352, stats.bytes_free);
    try expectEqual(4 * 16 * kb + 4352, stats.bytes_high_water);
    try pool.release_buffer(buffers[3].ptr);
}

test "pool: misses of acquire are zero, whoever had the memory before" {
    for ([_]bool{ false, true }) |zero_on_release| {
        const options: pool_file.Options = .{
            .max_free_per_class = 1,
            .zero_on_release = zero_on_release,
        };
        const pool = try Pool.create(gpa, options);
        defer pool.release();
        var buffers: [3]Buffer = undefined;
        for (&buffers) |*buffer| buffer.* = try pool.acquire(kb);
        for (buffers) |buffer| @memset(buffer, 0xff);
        for (buffers) |buffer| try pool.release_buffer(buffer.ptr); // one kept, two dropped
        for (&buffers, 0..) |*buffer, index| {
            buffer.* = try pool.acquire(kb);
            const is_hit = index == 0;
            const clean: u8 = if (is_hit and !zero_on_release) 0xff else 0;
            try expect(std.mem.allEqual(u8, buffer.*, clean));
        }
        for (buffers) |buffer| try pool.release_buffer(buffer.ptr);
    }
}

test "pool: the limit is hard, idle buffers make room, a batch is all or nothing" {
    const pool = try Pool.create(gpa, .{ .max_bytes = 64 * kb });
    defer pool.release();
    try expectError(error.PoolExhausted, pool.acquire(64 * kb + 1));
    const large = try pool.acquire(64 * kb);
    try expect(pool.stats().bytes_reserved <= 128 * kb);
    try expectError(error.PoolExhausted, pool.acquire(1));
    try pool.release_buffer(large.ptr);
    try expectEqual(64 * kb, pool.stats().bytes_free);

    var pages: [16]Page = undefined;
    try pool.acquire_pages(4096 - 64, pages[0..15]); // drops the idle 64 KB
    try expectEqual(1, pool.stats().drops);
    check(pool);
    const before = pool.stats();
    var more: [2]Page = undefined;
    try expectError(error.PoolExhausted, pool.acquire_pages(4096 - 64, &more));
    try expectEqual(before, pool.stats());
    try pool.acquire_pages(4096 - 64, more[0..1]);
    pool.release_pages(4096 - 64, pages[0..15]);
    pool.release_page(more[0], 4096 - 64);

    // A batch larger than half the limit uses the pages that are idle instead of dropping them.
    try pool.acquire_pages(4096 - 64, &pages);
    try expectEqual(16, pool.stats().hits);
    pool.release_pages(4096 - 64, &pages);
    try expectError(error.PoolExhausted, pool.prewarm(4 * kb, 17));
    try pool.prewarm(4 * kb, 16);
    check(pool);
}

test "pool: a class without slabs lends its entry to another size" {
    const pool = try Pool.create(gpa, .{ .max_free_per_class = 0 });
    defer pool.release();
    for (1..200) |index| {
        const page = try pool.acquire_page(64 * index);
        pool.release_page(page, 64 * index);
    }
    try expect(pool.classes.items.len <= pool_file.public_class_bytes.len + 1);
    check(pool);
}

test "pool: a batch takes slabs that fit it, and large slabs are few" {
    const pool = try Pool.create(gpa, .{});
    defer pool.release();
    var pages: [1000]Page = undefined;
    try pool.acquire_pages(4352, &pages);
    if (!builtin.target.cpu.arch.isWasm()) try expect(pool.slabs.items.len <= 3);
    pool.release_pages(4352, &pages);
    check(pool);
}

fn use_pool(allocator: std.mem.Allocator) !void {
    const source: Source = .{ .allocator = allocator, .zeroed = false };
    const options: pool_file.Options = .{ .max_free_per_class = 4, .max_bytes = 2 << 20 };
    const pool = try Pool.create_with_source(allocator, source, options);
    defer pool.release();
    defer check(pool);
    const buffer = try pool.acquire(kb);
    try expect(std.mem.allEqual(u8, buffer, 0));
    {
        errdefer pool.release_buffer(buffer.ptr) catch unreachable;
        const before = pool.stats();
        errdefer assert(std.meta.eql(before, pool.stats()));
        try pool.prewarm(300 * kb, 2);
    }
    try pool.release_buffer(buffer.ptr);

    const before = pool.stats();
    var pages: [40]Page = undefined;
    pool.acquire_pages(20 * kb, &pages) catch |err| {
        assert(pool.stats().misses == before.misses);
        assert(pool.stats().bytes_in_use == before.bytes_in_use);
        return err;
    };
    pool.release_pages(20 * kb, &pages);
}

test "pool: nothing leaks and nothing is half done, whichever allocation fails" {
    try std.testing.checkAllAllocationFailures(gpa, use_pool, .{});
}

fn hammer(pool: *Pool, seed: u64, failed: *std.atomic.Value(u32)) void {
    var prng: std.Random.DefaultPrng = .init(seed);
    var walk: Walk = .{ .pool = pool, .random = prng.random(), .sentinel = seed << 32 };
    defer walk.deinit();
    for ([_]u8{ 60, 40 }) |grow_percent| {
        walk.run(500, grow_percent) catch {
            _ = failed.fetchAdd(1, .monotonic);
        };
    }
}

test "pool: threads share it" {
    if (builtin.single_threaded) return error.SkipZigTest;
    const pool = try Pool.create(gpa, .{ .max_bytes = 64 << 20, .zero_on_release = true });
    defer pool.release();
    var failed: std.atomic.Value(u32) = .init(0);
    var threads: [2]std.Thread = undefined;
    for (&threads, 1..) |*thread, seed| {
        thread.* = try std.Thread.spawn(.{}, hammer, .{ pool, seed, &failed });
    }
    for (threads) |thread| thread.join();
    try expectEqual(0, failed.load(.monotonic));
    try expectEqual(0, pool.stats().bytes_in_use);
    check(pool);
}

test "pool: lives as long as its last owner" {
    const pool = try Pool.create(gpa, .{});
    const page = try pool.acquire_page(64);
    pool.retain();
    pool.release();
    @memset(page[0..64], 1);
    pool.release(); // with a page still out: its slab goes all the same
}
