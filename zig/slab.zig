//! One slab: a run of equal slots in memory of the operating system.
//!
//! What is known about a slot stands outside the slab, so a host that writes past its buffer breaks
//! data and never the bookkeeping. Called by pool.zig, which holds its lock meanwhile.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const Alignment = std.mem.Alignment;

/// Where slabs come from.
pub const Source = struct {
    allocator: std.mem.Allocator,
    /// Memory arrives zero-filled. Without this a slab is cleared when it is made.
    zeroed: bool,

    pub const system: Source = .{
        .allocator = std.heap.page_allocator,
        // The allocator of WebAssembly hands freed memory out again.
        .zeroed = !builtin.target.cpu.arch.isWasm(),
    };
};

/// What the processor can map with one huge page (x86-64, and arm64 with pages of 4 KB).
pub const huge_bytes = 2 << 20;

const huge_pages_known = builtin.os.tag == .linux;

pub const Slab = struct {
    /// What the operating system gave; slots begin at its start.
    memory: []align(64) u8,
    slot_bytes: usize,
    /// One entry per slot: a `state_*`, or for a recycled slot the next one of the stack.
    slots: []u32,
    /// Top of the stack of recycled slots.
    recycled: u32 = stack_end,
    /// Slots from here on were never taken, and are still zero.
    untouched: u32 = 0,
    /// Slots taken and not given back.
    slots_out: u32 = 0,
    /// Class of the pool this slab belongs to.
    class_index: u32,
    /// Neighbours in the class's list of slabs with room.
    previous: ?*Slab = null,
    next: ?*Slab = null,

    /// States of a slot that is out. Anything smaller is a link of the stack.
    pub const state_host: u32 = 0xffff_ffff;
    pub const state_page: u32 = 0xffff_fffe;
    pub const state_idle: u32 = 0xffff_fffd;
    const stack_end: u32 = 0xffff_fffc;
    pub const slots_max: u32 = 1 << 20;

    pub fn create(
        gpa: std.mem.Allocator,
        source: Source,
        class_index: u32,
        slot_bytes: usize,
        slot_count: u32,
    ) error{OutOfMemory}!*Slab {
        assert(slot_bytes > 0 and slot_bytes % 64 == 0);
        assert(slot_count > 0 and slot_count <= slots_max);
        const slab = try gpa.create(Slab);
        errdefer gpa.destroy(slab);
        const slots = try gpa.alloc(u32, slot_count);
        errdefer gpa.free(slots);

        const bytes = memory_bytes(slot_bytes, slot_count);
        // Not `alloc`: in safe builds that one fills what it returns, and so touches every page.
        const pointer = source.allocator.rawAlloc(bytes, alignment(bytes), @returnAddress()) orelse
            return error.OutOfMemory;
        const memory: []align(64) u8 = @alignCast(pointer[0..bytes]);
        if (!source.zeroed) @memset(memory, 0);

        @memset(slots, stack_end);
        slab.* = .{
            .memory = memory,
            .slot_bytes = slot_bytes,
            .slots = slots,
            .class_index = class_index,
        };
        return slab;
    }

    pub fn destroy(slab: *Slab, gpa: std.mem.Allocator, source: Source) void {
        const memory = slab.memory;
        source.allocator.rawFree(memory, alignment(memory.len), @returnAddress());
        gpa.free(slab.slots);
        gpa.destroy(slab);
    }

    /// Asks for huge pages; true if the system agreed to try.
    pub fn advise_huge(slab: *const Slab) bool {
        return advise(slab.memory);
    }

    pub const Taken = struct { slot: u32, untouched: bool };

    /// A slot used before is preferred: its memory is already there.
    pub fn take(slab: *Slab, state: u32) Taken {
        assert(slab.has_room());
        assert(state > stack_end);
        var taken: Taken = .{ .slot = slab.recycled, .untouched = false };
        if (slab.recycled != stack_end) {
            slab.recycled = slab.slots[taken.slot];
        } else {
            taken = .{ .slot = slab.untouched, .untouched = true };
            slab.untouched += 1;
        }
        slab.slots[taken.slot] = state;
        slab.slots_out += 1;
        return taken;
    }

    pub fn give_back(slab: *Slab, slot: u32) void {
        assert(slab.slots[slot] > stack_end);
        assert(slab.slots_out > 0);
        slab.slots[slot] = slab.recycled;
        slab.recycled = slot;
        slab.slots_out -= 1;
    }

    pub fn has_room(slab: *const Slab) bool {
        return slab.slots_out < slab.slots.len;
    }

    pub fn slot_memory(slab: *const Slab, slot: u32) []align(64) u8 {
        assert(slot < slab.slots.len);
        const start = slab.memory.ptr + slot * slab.slot_bytes;
        return @alignCast(start[0..slab.slot_bytes]);
    }

    /// The slot that begins at `address`, if one does.
    pub fn slot_at(slab: *const Slab, address: usize) ?u32 {
        const base = @intFromPtr(slab.memory.ptr);
        if (address < base) return null;
        const offset = address - base;
        if (offset % slab.slot_bytes != 0) return null;
        const slot = offset / slab.slot_bytes;
        return if (slot < slab.slots.len) @intCast(slot) else null;
    }
};

fn advise(memory: []u8) bool {
    if (!huge_pages_known or memory.len < huge_bytes) return false;
    const advice = std.os.linux.MADV.HUGEPAGE;
    const result = std.os.linux.madvise(memory.ptr, memory.len, advice);
    return std.os.linux.errno(result) == .SUCCESS;
}

/// Whether the system agrees to try huge pages at all: asks for one, and gives it back.
pub fn huge_pages_offered() bool {
    if (!huge_pages_known) return false;
    const system = std.heap.page_allocator;
    const memory = system.alignedAlloc(u8, alignment(huge_bytes), huge_bytes) catch return false;
    defer system.free(memory);
    return advise(memory);
}

/// Whole pages of the system. A slab that all but fills a huge page is given the rest of it.
fn memory_bytes(slot_bytes: usize, slot_count: u32) usize {
    const bytes = slot_bytes * slot_count;
    if (builtin.target.cpu.arch.isWasm()) return bytes;
    const rest_max = @min(slot_bytes, huge_bytes / 8);
    if (huge_pages_known and bytes < huge_bytes and huge_bytes - bytes < rest_max) {
        return huge_bytes;
    }
    return std.mem.alignForward(usize, bytes, std.heap.pageSize());
}

fn alignment(bytes: usize) Alignment {
    if (huge_pages_known and bytes >= huge_bytes) return .fromByteUnits(huge_bytes);
    return .@"64";
}

test "slab: slots are disjoint, recycled last in first out, and found by address" {
    const gpa = std.testing.allocator;
    const slab = try Slab.create(gpa, .system, 7, 192, 3);
    defer slab.destroy(gpa, .system);
    for (0..3) |index| {
        const taken = slab.take(Slab.state_host);
        try std.testing.expectEqual(index, taken.slot);
        try std.testing.expect(taken.untouched);
        try std.testing.expect(std.mem.allEqual(u8, slab.slot_memory(taken.slot), 0));
        @memset(slab.slot_memory(taken.slot), 0xff);
    }
    try std.testing.expect(!slab.has_room());
    slab.give_back(2);
    slab.give_back(0);
    try std.testing.expectEqual(0, slab.take(Slab.state_page).slot);
    try std.testing.expectEqual(2, slab.take(Slab.state_page).slot);

    const base = @intFromPtr(slab.memory.ptr);
    try std.testing.expectEqual(1, slab.slot_at(base + 192).?);
    try std.testing.expectEqual(null, slab.slot_at(base + 64));
    try std.testing.expectEqual(null, slab.slot_at(base + 3 * 192));
    try std.testing.expectEqual(null, slab.slot_at(base - 192));
}

test "slab: a slab that nearly fills a huge page is aligned to it" {
    if (!huge_pages_known) return error.SkipZigTest;
    try std.testing.expectEqual(huge_bytes, memory_bytes(4352, huge_bytes / 4352));
    try std.testing.expectEqual(3 * 512 * 1024, memory_bytes(3 * 512 * 1024, 1));
    const slab = try Slab.create(std.testing.allocator, .system, 0, 4352, huge_bytes / 4352);
    defer slab.destroy(std.testing.allocator, .system);
    _ = slab.advise_huge();
    try std.testing.expectEqual(0, @intFromPtr(slab.memory.ptr) % huge_bytes);
}
