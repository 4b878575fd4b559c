//! The state of a cache as numbers and bytes, and back: what a host writes to a file and reads
//! again. Bytes depend on the token stream alone: slots without a live token leave as zeros, so
//! that nothing of trimmed or evicted tokens leaves at all. docs/snapshot.md describes the file.
//!
//! A row is the pages of all kv heads that cover the same positions. Each page has a hash, XXH64
//! with seed 0. Called by abi.zig; calls cache.zig, tier.zig, threads.zig.
const std = @import("std");
const abi = @import("abi.zig");
const cache_file = @import("cache.zig");
const format = @import("format.zig");
const message = @import("message.zig");
const Row = @import("table.zig").Row;
const spill = @import("spill.zig");
const threads = @import("threads.zig");
const Cache = cache_file.Cache;
const Half = format.Half;
const kept = @import("snapshot_kept.zig");
const Mapping = @import("mapping.zig").Mapping;
const Range = @import("kept.zig").Range;
const tier_file = @import("tier.zig");
const Piece = tier_file.Piece;
const Tier = tier_file.Tier;

/// Below this many bytes, waking other threads costs more than it gains.
const parallel_bytes_min = 1 << 20;
const position_max = std.math.maxInt(u48);

pub fn hash(bytes: []const u8) u64 {
    return std.hash.XxHash64.hash(0, bytes);
}

/// Hashes blocks of equal size that follow one another.
pub fn hash_pages(
    blocks: [*]const u8,
    bytes: u64,
    count: u64,
    hashes: [*]u64,
) error{InvalidArgument}!void {
    const size = std.math.cast(usize, bytes) orelse return error.InvalidArgument;
    const blocks_len = std.math.cast(usize, count) orelse return error.InvalidArgument;
    for (hashes[0..blocks_len], 0..) |*out, i| out.* = hash(blocks[i * size ..][0..size]);
}

/// The numbers that, with the pages, are the whole state.
pub fn state(cache: *Cache) abi.CacheState {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    return .{
        .next = cache.next,
        .begin = cache.begin,
        .cold = cache.cold,
        .boundary = cache.boundary,
        .evicted = cache.evicted,
        .migrated = cache.migrated,
        .sink_rows = tier_state(cache.tier_of(.sinks)).rows,
        .store_rows = tier_state(cache.tier_of(.store)).rows,
        .warm_rows = tier_state(cache.tier_of(.warm)).rows,
        .tail_rows = tier_state(cache.tier_of(.tail)).rows,
        .kept_rows = kept.row_count(cache.body(), cache.kept_runs()),
    };
}

pub fn tier(cache: *Cache, name: u32) error{InvalidArgument}!abi.TierState {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    if (name == kept.tier_name) return kept.state(cache);
    return tier_state(try tier_named(cache, name));
}

fn tier_named(cache: *const Cache, name: u32) error{InvalidArgument}!*const Tier {
    if (name < cache.tiers.len) return &cache.tiers[name];
    message.set("tier is {d}; expected 0 to 4: sinks, store, warm, tail, kept", .{name});
    return error.InvalidArgument;
}

fn tier_state(of: *const Tier) abi.TierState {
    var out: abi.TierState = .{
        .start = of.start,
        .end = of.end,
        .heads = of.heads,
        .page_bytes = of.page_bytes(),
    };
    if (of.start < of.end) out.first_row = of.start / of.tokens_per_page;
    out.rows = row_count(of, of.start, of.end);
    return out;
}

/// Rows that hold the positions [start, end).
fn row_count(of: *const Tier, start: u64, end: u64) u64 {
    if (start >= end) return 0;
    return (end - 1) / of.tokens_per_page + 1 - start / of.tokens_per_page;
}

/// Rows [first, first + count) of a tier, counted from position 0.
const Rows = struct { tier: *const Tier, first: u64, count: usize };

fn range_of(cache: *const Cache, name: u32, first: u64, count: u64) error{InvalidArgument}!Rows {
    const of = try tier_named(cache, name);
    const held = tier_state(of);
    if (first < held.first_row or first - held.first_row > held.rows or
        count > held.rows - (first - held.first_row))
    {
        message.set("rows [{d}, {d}) asked of a tier that holds [{d}, {d})", .{
            first, first +| count, held.first_row, held.first_row + held.rows,
        });
        return error.InvalidArgument;
    }
    return .{ .tier = of, .first = first, .count = @intCast(count) };
}

/// Copies rows out, (row, head, byte), and hashes each page, (row, head). Either may be left out.
pub fn read(
    cache: *Cache,
    name: u32,
    first: u64,
    count: u64,
    pages: ?[*]u8,
    hashes: ?[*]u64,
) error{ InvalidArgument, OutOfMemory, Damaged }!void {
    try cache.verify(); // damage must not get a new hash
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    if (name == kept.tier_name) return kept.read(cache, first, count, pages, hashes);
    const range = try range_of(cache, name, first, count);
    var job: Job = .{ .range = range, .pages = pages, .hashes = hashes, .scratch = &.{} };
    defer cache.gpa.free(job.scratch);
    if (pages == null and hashes != null) {
        // Pages that have to be cleaned before they are hashed are cleaned in a copy.
        var partial: usize = 0;
        for (0..range.count) |row| partial += @intFromBool(!job.is_whole(row));
        job.scratch = try cache.gpa.alloc(u8, @min(partial, 1) * range.tier.page_bytes());
    }
    job.run(read_page);
    const of = range.tier;
    const start = @max(of.start, first * of.tokens_per_page);
    spill.leave_all(of, start, @min(of.end, (first + count) * of.tokens_per_page));
}

/// Copies rows in, and hashes what came. The slots that hold no token are as they come.
pub fn write(
    cache: *Cache,
    name: u32,
    first: u64,
    count: u64,
    pages: [*]const u8,
    hashes: ?[*]u64,
) error{InvalidArgument}!void {
    cache.lock.lock();
    defer cache.lock.unlock();
    if (name == kept.tier_name) return kept.write(cache, first, count, pages, hashes);
    const range = try range_of(cache, name, first, count);
    for (range.tier.rows[@intCast(first - range.tier.first_page)..][0..range.count]) |row| {
        if (row.alone()) continue;
        message.set("a row that is shared, or in a file, cannot be overwritten", .{});
        return error.InvalidArgument;
    }
    var job: Job = .{
        .range = range,
        .pages = @constCast(pages),
        .hashes = hashes,
        .scratch = &.{},
    };
    job.run(write_page);
}

/// Makes an empty cache hold the positions of `given`, in rows of the mapping where `pieces` says
/// so, elsewhere in rows of zeros that `write` is going to fill.
pub fn set_state(
    cache: *Cache,
    given: *const abi.CacheState,
    ranges: []const Range,
    mapping: ?*Mapping,
    pieces: []const abi.MappedRows,
) error{ InvalidArgument, OutOfMemory, PoolExhausted }!void {
    cache.lock.lock();
    defer cache.lock.unlock();
    if (cache.next != 0) {
        message.set("the cache holds tokens; expected an empty one", .{});
        return error.InvalidArgument;
    }
    const count_max = std.math.maxInt(i64);
    const sane = given.next <= position_max and given.begin <= given.next and
        given.cold <= given.boundary and given.boundary <= given.next and
        given.evicted <= count_max and given.migrated <= count_max;
    const tiers_fit = (cache.config.kind == .two_tier or given.boundary == 0) and
        (cache.config.has_warm() or given.cold == given.boundary);
    if (!sane or !tiers_fit) {
        const text = "next {d}, begin {d}, cold {d}, boundary {d}: not the state of a cache";
        message.set(text, .{ given.next, given.begin, given.cold, given.boundary });
        return error.InvalidArgument;
    }
    const after: Cache.Plan = .{
        .next = given.next,
        .begin = given.begin,
        .boundary = given.boundary,
        .cold = given.cold,
    };
    const bounds = cache.bounds(after);
    const rows = .{ given.sink_rows, given.store_rows, given.warm_rows, given.tail_rows };
    const kept_tokens = try kept.check(cache, bounds, ranges, given.kept_rows);
    try check_size(cache, bounds, rows, kept_tokens);
    var end: usize = pieces.len;
    while (end > 0 and pieces[end - 1].tier == kept.tier_name) end -= 1;
    const behind = try kept.open(cache, &.{}, ranges, mapping, pieces[end..]);
    errdefer if (behind) |k| k.release(cache.gpa, cache.pool);
    try open_tiers(cache, bounds, mapping, pieces[0..end]);
    cache.replace_kept(behind);
    cache.next = given.next;
    cache.begin = given.begin;
    cache.boundary = given.boundary;
    cache.cold = given.cold;
    cache.evicted = given.evicted;
    cache.migrated = given.migrated;
    if (mapping) |m| cache.replace_mapping(m.retain());
}

fn check_size(
    cache: *const Cache,
    bounds: [cache_file.tier_count][2]u64,
    rows: [cache_file.tier_count]u64,
    kept_tokens: u64,
) error{InvalidArgument}!void {
    var tokens = kept_tokens;
    for (bounds, &cache.tiers, rows) |bound, *of, expected| {
        tokens += bound[1] - bound[0];
        const needed = row_count(of, bound[0], bound[1]);
        if (needed == expected) continue;
        message.set("{d} rows given for positions that need {d}", .{ expected, needed });
        return error.InvalidArgument;
    }
    const config = &cache.config;
    const warm = bounds[@backingInt(cache_file.TierName.warm)];
    const tail = bounds[@backingInt(cache_file.TierName.tail)];
    try config.check_recent(warm[1] - warm[0], tail[1] - tail[0]);
    if (tokens <= config.max_tokens) return;
    message.set("{d} tokens; max_tokens is {d}", .{ tokens, config.max_tokens });
    return error.InvalidArgument;
}

/// Opens all tiers, or none.
fn open_tiers(
    cache: *Cache,
    bounds: [cache_file.tier_count][2]u64,
    mapping: ?*Mapping,
    pieces: []const abi.MappedRows,
) error{ InvalidArgument, OutOfMemory, PoolExhausted }!void {
    const gpa = cache.gpa;
    const list = try gpa.alloc(Piece, pieces.len);
    defer gpa.free(list);
    var fresh = cache.tiers;
    var opened: usize = 0;
    errdefer for (fresh[0..opened]) |*of| of.deinit(gpa, cache.pool);
    var start: usize = 0;
    for (&fresh, bounds, 0..) |*of, bound, number| {
        var end = start;
        while (end < pieces.len and pieces[end].tier == number) : (end += 1) {
            const piece = &pieces[end];
            list[end] = .{
                .first = piece.first,
                .count = piece.count,
                .region = piece.region,
                .offset = piece.offset,
            };
        }
        try of.open(gpa, cache.pool, bound[0], bound[1], mapping, list[start..end]);
        opened += 1;
        start = end;
    }
    if (start < pieces.len) {
        message.set("rows of a mapping: expected in the order of tiers and rows", .{});
        return error.InvalidArgument;
    }
    cache.tiers = fresh;
}

/// Leaves a gap behind the sinks of a cache that holds nothing else.
pub fn skip(
    cache: *Cache,
    position: u64,
) error{ InvalidArgument, OutOfMemory, PoolExhausted }!void {
    cache.lock.lock();
    defer cache.lock.unlock();
    const sinks = cache.config.sink_tokens;
    if (cache.next != sinks or position < sinks or position > position_max) {
        message.set("skip to {d} after {d} tokens; expected exactly the {d} sinks before", .{
            position, cache.next, sinks,
        });
        return error.InvalidArgument;
    }
    try cache.move(.{ .next = position, .begin = position, .boundary = 0, .cold = 0 });
    cache.evicted = position - sinks;
}

/// Bytes of pages that lie in files.
pub fn mapped_bytes(cache: *Cache) u64 {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    var bytes: u64 = 0;
    var before: ?*const Row = null;
    for (0..cache.run_count()) |i| {
        const of = cache.run(i);
        for (of.rows) |row| {
            // A row that lies across two runs counts once.
            if (row.mapping != null and row != before) bytes += of.heads * of.page_bytes();
            before = row;
        }
    }
    return bytes;
}

/// Bytes of the pool that caches hold together; what several hold counts once.
pub fn held_bytes(caches: []const *Cache) error{OutOfMemory}!u64 {
    if (caches.len == 0) return 0;
    const gpa = caches[0].gpa;
    const Held = struct {
        row: usize,
        bytes: u64,

        fn less(_: void, a: @This(), b: @This()) bool {
            return a.row < b.row;
        }
    };
    var all: std.ArrayList(Held) = .empty;
    defer all.deinit(gpa);
    for (caches) |cache| {
        cache.lock.lockShared();
        defer cache.lock.unlockShared();
        for (0..cache.run_count()) |i| {
            const of = cache.run(i);
            for (of.rows) |row| {
                if (row.mapping != null) continue;
                const bytes = of.heads * of.page_bytes();
                try all.append(gpa, .{ .row = @intFromPtr(row), .bytes = bytes });
            }
        }
    }
    std.mem.sortUnstable(Held, all.items, {}, Held.less);
    var bytes: u64 = 0;
    var before: usize = 0;
    for (all.items) |held| {
        if (held.row != before) bytes += held.bytes;
        before = held.row;
    }
    return bytes;
}

/// One call of `read` or `write`: page by page, in any order.
const Job = struct {
    range: Rows,
    pages: ?[*]u8,
    hashes: ?[*]u64,
    scratch: []u8,

    const task_bytes = 256 << 10;

    fn run(job: *Job, comptime page_function: fn (*Job, usize, usize) void) void {
        const Task = struct {
            fn run_task(context: *anyopaque, task: u32) void {
                const mine: *Job = @ptrCast(@alignCast(context));
                const first = task * mine.rows_per_task();
                for (first..@min(first + mine.rows_per_task(), mine.range.count)) |row| {
                    if (!mine.shares_scratch(row)) mine.run_row(row, page_function);
                }
            }
        };
        const per_task = job.rows_per_task();
        const tasks: u32 = @intCast((job.range.count + per_task - 1) / per_task);
        if (job.range.count *| job.row_bytes() >= parallel_bytes_min) {
            threads.run(tasks, job, Task.run_task);
        } else for (0..tasks) |task| Task.run_task(job, @intCast(task));
        for (0..job.range.count) |row| {
            if (job.shares_scratch(row)) job.run_row(row, page_function);
        }
    }

    fn run_row(job: *Job, row: usize, comptime page_function: fn (*Job, usize, usize) void) void {
        for (0..job.range.tier.heads) |head| page_function(job, row, head);
    }

    /// Whether a row has to wait for the others that need the one scratch.
    fn shares_scratch(job: *const Job, row: usize) bool {
        return job.scratch.len > 0 and !job.is_whole(row);
    }

    fn row_bytes(job: *const Job) usize {
        return job.range.tier.heads * job.range.tier.page_bytes();
    }

    fn rows_per_task(job: *const Job) usize {
        return @max(1, task_bytes / job.row_bytes());
    }

    fn number(job: *const Job, row: usize) u64 {
        return job.range.first + row;
    }

    /// Slots of a row that hold live tokens.
    fn live(job: *const Job, row: usize) struct { start: usize, end: usize } {
        const of = job.range.tier;
        const first = job.number(row) * of.tokens_per_page;
        return .{
            .start = @intCast(@max(of.start, first) - first),
            .end = @intCast(@min(of.end, first + of.tokens_per_page) - first),
        };
    }

    fn is_whole(job: *const Job, row: usize) bool {
        const slots = job.live(row);
        return slots.start == 0 and slots.end == job.range.tier.key.slots;
    }

    fn index(job: *const Job, row: usize, head: usize) usize {
        return row * job.range.tier.heads + head;
    }
};

fn read_page(job: *Job, row: usize, head: usize) void {
    const of = job.range.tier;
    const bytes = of.page_bytes();
    const page = of.page_at(job.number(row), head)[0..bytes];
    const place = job.index(row, head);
    const whole = job.is_whole(row);
    var out: []const u8 = page;
    if (job.pages != null or !whole) {
        const copy = if (job.pages) |pages| pages[place * bytes ..][0..bytes] else job.scratch;
        @memcpy(copy, page);
        if (!whole) {
            const slots = job.live(row);
            clean(of.key, .key, copy[0..of.key.bytes()], slots.start, slots.end);
            clean(of.value, .value, copy[of.key.bytes()..], slots.start, slots.end);
        }
        out = copy;
    }
    if (job.hashes) |hashes| hashes[place] = hash(out);
}

fn write_page(job: *Job, row: usize, head: usize) void {
    const of = job.range.tier;
    const bytes = of.page_bytes();
    const place = job.index(row, head);
    const page = of.page_at(job.number(row), head)[0..bytes];
    @memcpy(page, job.pages.?[place * bytes ..][0..bytes]);
    if (job.hashes) |hashes| hashes[place] = hash(page);
}

/// Zeros the slots of a half outside [start, end).
fn clean(half: Half, comptime side: format.Side, base: []u8, start: usize, end: usize) void {
    switch (half.format) {
        inline else => |tag| {
            const T = format.all[@backingInt(tag)];
            if (!T.quantized) {
                const bytes = half.row_bytes();
                @memset(base[0 .. start * bytes], 0);
                @memset(base[end * bytes ..], 0);
                return;
            }
            const scales = base[half.code_bytes()..];
            for (0..half.slots) |slot| {
                if (slot >= start and slot < end) continue;
                for (0..half.dim_stored()) |dim| T.set(side, base.ptr, slot, dim, 0);
                for (0..half.groups()) |g| {
                    const size = @sizeOf(T.Scale);
                    @memset(scales[(g * format.page_tokens + slot) * size ..][0..size], 0);
                }
            }
        },
    }
}

test "the hash is XXH64" {
    try std.testing.expectEqual(0xef46db3751d8e999, hash(""));
    try std.testing.expectEqual(0x44bc2cf5ad770999, hash("abc"));
}

test "cleaning touches dead slots alone" {
    const gpa = std.testing.allocator;
    inline for ([_]format.Format{ .f16, .q8, .q4, .q5k, .q3k }) |f| {
        const half: Half = .{ .format = f, .dim = 64, .slots = 64, .rotated = false };
        inline for ([_]format.Side{ .key, .value }) |side| {
            const T = format.all[@backingInt(f)];
            const bytes = try gpa.alloc(u8, half.bytes());
            defer gpa.free(bytes);
            @memset(bytes, 0xff);
            clean(half, side, bytes, 3, 50);
            var zeros: usize = 0;
            for (bytes) |byte| zeros += @as(usize, @popCount(~byte));
            try std.testing.expectEqual(half.bytes() * 8 / 64 * (64 - 47), zeros);
            if (T.quantized) for (0..64) |slot| {
                const expected: u8 = if (slot < 3 or slot >= 50) 0 else (1 << T.bits) - 1;
                try std.testing.expectEqual(expected, T.get(side, bytes.ptr, slot, 37));
            };
        }
    }
}
