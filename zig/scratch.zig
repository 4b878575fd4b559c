//! Working memory of attention: one block is kept between calls, so that decoding allocates
//! nothing. Called by attend.zig.
const std = @import("std");
const gpa = @import("memory.zig").gpa;

pub const Block = []align(64) f32;

/// Address of the block that waits for the next call, or 0. Its first line holds its length.
var kept: std.atomic.Value(usize) = .init(0);
const header_floats = 16;
const kept_floats_max = 16 << 20;

fn whole(address: usize) Block {
    const base: [*]align(64) f32 = @ptrFromInt(address);
    return base[0..@as(*const usize, @ptrCast(base)).*];
}

/// At least `floats` values, contents undefined.
pub fn acquire(floats: usize) error{OutOfMemory}!Block {
    const address = kept.swap(0, .acq_rel);
    if (address != 0) {
        const block = whole(address);
        if (block.len >= floats + header_floats) return @alignCast(block[header_floats..]);
        gpa.free(block);
    }
    const block = try gpa.alignedAlloc(f32, .@"64", floats + header_floats);
    @as(*usize, @ptrCast(block.ptr)).* = block.len;
    return @alignCast(block[header_floats..]);
}

pub fn release(block: Block) void {
    const address = @intFromPtr(block.ptr) - header_floats * @sizeOf(f32);
    if (whole(address).len <= kept_floats_max) {
        if (kept.cmpxchgStrong(0, address, .acq_rel, .monotonic) == null) return;
    }
    gpa.free(whole(address));
}

/// A block cut into equal parts, one for each task that runs at a time.
pub const Lanes = struct {
    block: Block,
    count: usize,
    /// One bit for each lane that is not taken.
    free: std.atomic.Value(usize),

    pub const count_max = @bitSizeOf(usize);

    pub fn init(block: Block, count: usize) Lanes {
        std.debug.assert(count >= 1 and count <= count_max);
        const all = @as(usize, std.math.maxInt(usize)) >> @intCast(count_max - count);
        return .{ .block = block, .count = count, .free = .init(all) };
    }

    /// The lane that this thread had last, which is in its caches and, written, in nobody else's.
    threadlocal var latest: std.math.Log2Int(usize) = 0;

    pub fn take(lanes: *Lanes) usize {
        while (true) {
            const free = lanes.free.load(.monotonic);
            if (free == 0) {
                std.atomic.spinLoopHint();
                continue;
            }
            const own = @as(usize, 1) << latest;
            const bit = if (free & own != 0) own else free & (~free + 1);
            if (lanes.free.cmpxchgWeak(free, free & ~bit, .acquire, .monotonic) != null) continue;
            latest = @intCast(@ctz(bit));
            return latest;
        }
    }

    pub fn give(lanes: *Lanes, lane: usize) void {
        _ = lanes.free.fetchOr(@as(usize, 1) << @intCast(lane), .release);
    }

    pub fn memory(lanes: *const Lanes, lane: usize) Block {
        const size = lanes.block.len / lanes.count;
        return @alignCast(lanes.block[lane * size ..][0..size]);
    }
};

test "a block is kept, and replaced when it is too small" {
    const a = try acquire(100);
    const b = try acquire(100);
    release(a);
    const again = try acquire(50);
    try std.testing.expectEqual(a.ptr, again.ptr);
    release(again);
    const larger = try acquire(100_000);
    try std.testing.expect(larger.len >= 100_000);
    release(b);
    release(larger);
}

test "lanes are handed out once" {
    const block = try acquire(64);
    defer release(block);
    var lanes: Lanes = .init(@alignCast(block[0..64]), 4);
    const first = lanes.take();
    const second = lanes.take();
    try std.testing.expect(first != second);
    lanes.give(first);
    try std.testing.expectEqual(first, lanes.take());
}
