//! Where pages go that have no room in memory: a file, written in chunks of 2048 positions, which
//! attention reads through a mapping.
//!
//! A pool with a spill has it instead of refusing: a cache that wants more pages than are left
//! writes out its oldest ones. What is in the file is never written again, so it is shared,
//! copied and given up like any row of a mapping. Pages of one kv head lie together in a chunk:
//! attention takes one head after the other, tells the system what comes next, and gives the
//! memory back behind it, so that little of the file is resident at a time.
//!
//! Called by append.zig, attend.zig, pool.zig and abi_snapshot.zig; calls table.zig, mapping.zig.
const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const Cache = @import("cache.zig").Cache;
const Mapping = @import("mapping.zig").Mapping;
const message = @import("message.zig");
const Row = @import("table.zig").Row;
const sync = @import("sync.zig");
const Tier = @import("tier.zig").Tier;

/// Whether there is anything to spill to on this system.
pub const offered = builtin.os.tag == .linux or builtin.os.tag == .macos;

/// Positions that move to the file together: those that attention takes at once.
const chunk_tokens = 2048;
/// Around what is touched the system maps up to so much more that it has at hand (Linux).
const fault_bytes = 64 << 10;
/// Bytes of the file that are mapped at once, unless a chunk needs more.
const region_bytes_min = 64 << 20;

const Bytes = []align(std.heap.page_size_min) u8;

/// A part of the file, and where it is in memory.
pub const Extent = struct { offset: u64, bytes: Bytes };

pub const Spill = struct {
    gpa: Allocator,
    file: i32,
    /// Bytes that may ever be written; 0 is no limit.
    write_bytes_max: u64,
    /// Guards everything below.
    mutex: sync.Mutex = .{},
    regions: std.ArrayList(Bytes) = .empty,
    file_bytes: u64 = 0,
    /// What of the newest region nobody had yet.
    fresh: Extent = .{ .offset = 0, .bytes = &.{} },
    /// Given back, to be used again by chunks of the same size.
    idle: std.ArrayList(Extent) = .empty,
    bytes_held: u64 = 0,
    bytes_written: u64 = 0,

    /// Takes over the file, which is empty.
    pub fn create(gpa: Allocator, file: i32, write_bytes_max: u64) error{OutOfMemory}!*Spill {
        const spill = try gpa.create(Spill);
        spill.* = .{ .gpa = gpa, .file = file, .write_bytes_max = write_bytes_max };
        return spill;
    }

    pub fn destroy(spill: *Spill) void {
        for (spill.regions.items) |region| system.unmap(region);
        spill.regions.deinit(spill.gpa);
        spill.idle.deinit(spill.gpa);
        system.close(spill.file);
        spill.gpa.destroy(spill);
    }

    /// Bytes that are in the file now, and that were ever written.
    pub fn counts(spill: *Spill) [2]u64 {
        spill.mutex.lock();
        defer spill.mutex.unlock();
        return .{ spill.bytes_held, spill.bytes_written };
    }

    /// Room for `bytes`, which are going to be written; null if there is none.
    fn take(spill: *Spill, bytes: usize) ?Extent {
        spill.mutex.lock();
        defer spill.mutex.unlock();
        if (spill.write_bytes_max != 0 and
            spill.bytes_written + bytes > spill.write_bytes_max)
        {
            message.set("no room in the pool, and its spill may write no more than {d} bytes", .{
                spill.write_bytes_max,
            });
            return null;
        }
        const extent = spill.find(bytes) catch return null;
        spill.bytes_held += bytes;
        spill.bytes_written += bytes;
        return extent;
    }

    fn find(spill: *Spill, bytes: usize) error{OutOfMemory}!Extent {
        for (spill.idle.items, 0..) |extent, i| {
            if (extent.bytes.len == bytes) return spill.idle.swapRemove(i);
        }
        // Giving back must never fail: there is a place for every extent that was handed out.
        const extents_max = spill.file_bytes / bytes + spill.idle.items.len + 1;
        try spill.idle.ensureTotalCapacity(spill.gpa, @intCast(extents_max));
        if (spill.fresh.bytes.len < bytes) try spill.grow(@max(bytes, region_bytes_min));
        const extent: Extent = .{
            .offset = spill.fresh.offset,
            .bytes = spill.fresh.bytes[0..bytes],
        };
        spill.fresh.offset += bytes;
        spill.fresh.bytes = @alignCast(spill.fresh.bytes[bytes..]);
        return extent;
    }

    fn grow(spill: *Spill, bytes: usize) error{OutOfMemory}!void {
        const size = std.mem.alignForward(usize, bytes, std.heap.pageSize());
        try spill.regions.ensureUnusedCapacity(spill.gpa, 1);
        const region = system.extend(spill.file, spill.file_bytes, size) orelse {
            message.set("no room in the pool, and its spill file cannot grow", .{});
            return error.OutOfMemory;
        };
        spill.regions.appendAssumeCapacity(region);
        spill.fresh = .{ .offset = spill.file_bytes, .bytes = region };
        spill.file_bytes += size;
    }

    pub fn give_back(spill: *Spill, extent: Extent) void {
        rest(extent.bytes);
        spill.mutex.lock();
        defer spill.mutex.unlock();
        spill.bytes_held -= extent.bytes.len;
        spill.idle.appendAssumeCapacity(extent);
    }
};

/// Moves the oldest pages of a cache that nobody else holds to the spill of its pool, one chunk of
/// them. False if there are none, or no room. The cache is locked, and no change is pending.
pub fn make_room(cache: *Cache) error{OutOfMemory}!bool {
    const spill = cache.pool.spill orelse return false;
    const tier = cache.tier_of(cache.body_name());
    const table = tier.table orelse return false;
    if (!table.alone() or chunk_tokens % tier.tokens_per_page != 0) return false;
    const per_chunk: usize = @intCast(chunk_tokens / tier.tokens_per_page);
    var first: usize = 0;
    while (first < tier.rows.len) {
        const number: usize = @intCast((tier.first_page + first) % per_chunk);
        const end = first + per_chunk - number;
        if ((tier.first_page + end) * tier.tokens_per_page > tier.end) return false; // not full yet
        const rows = table.live()[first..end];
        const free = for (rows) |row| {
            if (!row.alone()) break false;
        } else true;
        if (free) return move(cache, tier, rows, spill);
        first = end;
    }
    return false;
}

fn move(cache: *Cache, tier: *const Tier, rows: []*Row, spill: *Spill) error{OutOfMemory}!bool {
    const gpa = cache.gpa;
    const page_bytes = tier.page_bytes();
    const head_bytes = rows.len * page_bytes;
    const stride = std.mem.alignForward(usize, head_bytes, std.heap.pageSize());
    const extent_bytes = std.mem.alignForward(usize, tier.heads * stride, fault_bytes);
    const buffer = try gpa.alloc(u8, head_bytes);
    defer gpa.free(buffer);
    const extent = spill.take(extent_bytes) orelse return false;
    const mapping = Mapping.create(gpa) catch |err| {
        spill.give_back(extent);
        return err;
    };
    defer mapping.release(); // the rows hold it
    mapping.spilled = .{ .spill = spill, .extent = extent };

    for (0..tier.heads) |head| {
        for (rows, 0..) |row, i| {
            const page = row.pages()[head];
            @memcpy(buffer[i * page_bytes ..][0..page_bytes], page[0..page_bytes]);
        }
        if (!system.write(spill.file, buffer, extent.offset + head * stride)) {
            message.set("no room in the pool, and its spill file cannot be written", .{});
            return false;
        }
    }
    const moved = try gpa.alloc(*Row, rows.len);
    defer gpa.free(moved);
    var made: usize = 0;
    errdefer for (moved[0..made]) |row| row.release(gpa, cache.pool, tier.shape());
    for (moved, 0..) |*place, i| {
        const base = extent.bytes.ptr + i * page_bytes;
        place.* = try Row.create_mapped(gpa, tier.shape(), mapping, @alignCast(base), stride);
        made += 1;
    }
    for (rows, moved) |*place, row| {
        place.*.release(gpa, cache.pool, tier.shape());
        place.* = row;
    }
    return true;
}

/// After attention took the positions [start, end) of a head: gives their memory back, and tells
/// the system what comes after the chunk that it takes now.
pub fn leave(tier: *const Tier, start: u64, end: u64, head: usize) void {
    if (!offered or start >= end) return;
    if (spilled(tier, start, end, head)) |bytes| rest(bytes.around);
    const ahead = (end / chunk_tokens + 1) * chunk_tokens;
    if (ahead >= tier.end) return;
    const ahead_end = @min(tier.end, ahead + chunk_tokens);
    if (spilled(tier, ahead, ahead_end, head)) |bytes| system.will_need(bytes.exact);
}

/// The same after anything read the positions [start, end) of all heads.
pub fn leave_all(tier: *const Tier, start: u64, end: u64) void {
    if (!offered) return;
    var from = start; // chunk by chunk
    while (from < end) {
        const to = @min(end, (from / chunk_tokens + 1) * chunk_tokens);
        for (0..tier.heads) |head| leave(tier, from, to, head);
        from = to;
    }
}

const Spilled = struct {
    exact: Bytes,
    /// With what a page fault brings besides.
    around: Bytes,
};

/// The bytes of one head over positions of one chunk, if they are in the file.
fn spilled(tier: *const Tier, start: u64, end: u64, head: usize) ?Spilled {
    const first = tier.rows[@intCast(start / tier.tokens_per_page - tier.first_page)];
    const mapping = first.mapping orelse return null;
    const whole = (mapping.spilled orelse return null).extent.bytes;
    const last = tier.rows[@intCast((end - 1) / tier.tokens_per_page - tier.first_page)];
    if (last.mapping != mapping) return null;
    const base = @intFromPtr(whole.ptr);
    const from = @intFromPtr(first.pages()[head]) - base;
    const to = @intFromPtr(last.pages()[head]) - base + tier.page_bytes();
    return .{
        .exact = widened(whole, from, to, 0),
        .around = widened(whole, from, to, fault_bytes),
    };
}

/// Whole pages of the system around [from, to), and `more` bytes on both sides.
fn widened(whole: Bytes, from: usize, to: usize, more: usize) Bytes {
    const start = std.mem.alignBackward(usize, from -| more, std.heap.pageSize());
    return @alignCast(whole[start..@min(to + more, whole.len)]);
}

fn rest(bytes: Bytes) void {
    system.rest(bytes);
}

const system = if (offered) struct {
    const c = std.c;

    fn extend(file: i32, old: u64, bytes: usize) ?Bytes {
        if (c.ftruncate(file, @intCast(old + bytes)) != 0) return null;
        return std.posix.mmap(
            null,
            bytes,
            .{ .READ = true },
            .{ .TYPE = .SHARED },
            file,
            old,
        ) catch null;
    }

    fn unmap(bytes: Bytes) void {
        std.posix.munmap(bytes);
    }

    fn write(file: i32, bytes: []const u8, offset: u64) bool {
        var done: usize = 0;
        while (done < bytes.len) {
            const at: i64 = @intCast(offset + done);
            const count = c.pwrite(file, bytes.ptr + done, bytes.len - done, at);
            if (count <= 0) {
                if (count < 0 and std.posix.errno(count) == .INTR) continue;
                return false;
            }
            done += @intCast(count);
        }
        return true;
    }

    fn close(file: i32) void {
        _ = c.close(file);
    }

    fn will_need(bytes: Bytes) void {
        std.posix.madvise(bytes.ptr, bytes.len, std.posix.MADV.WILLNEED) catch {};
    }

    fn rest(bytes: Bytes) void {
        std.posix.madvise(bytes.ptr, bytes.len, std.posix.MADV.DONTNEED) catch {};
    }
} else struct {
    fn extend(_: i32, _: u64, _: usize) ?Bytes {
        return null;
    }
    fn unmap(_: Bytes) void {}
    fn write(_: i32, _: []const u8, _: u64) bool {
        return false;
    }
    fn close(_: i32) void {}
    fn will_need(_: Bytes) void {}
    fn rest(_: Bytes) void {}
};

test "extents are used again, and the write limit counts all that was written" {
    if (!offered) return error.SkipZigTest;
    const gpa = std.testing.allocator;
    const name = "spill_test.tmp";
    const flags: std.c.O = .{ .ACCMODE = .RDWR, .CREAT = true, .EXCL = true };
    const file = std.c.open(name, flags, @as(c_uint, 0o600));
    if (file < 0) return error.SkipZigTest;
    _ = std.c.unlink(name);
    const spill = try Spill.create(gpa, file, 3 << 16);
    defer spill.destroy();
    const a = spill.take(1 << 16).?;
    try std.testing.expect(system.write(file, "some bytes", a.offset));
    try std.testing.expectEqualStrings("some bytes", a.bytes[0..10]);
    spill.give_back(a);
    const b = spill.take(1 << 16).?;
    try std.testing.expectEqual(a.offset, b.offset);
    const c = spill.take(1 << 16).?;
    try std.testing.expect(c.offset != b.offset);
    try std.testing.expectEqual(null, spill.take(1 << 16));
    try std.testing.expectEqual([2]u64{ 2 << 16, 3 << 16 }, spill.counts());
}
