//! The buffer pool: equal-sized slots in slabs, a short free list per size, one hard limit for all.
//!
//! A size has a class. `acquire` pops the class's free list (a hit) or takes a slot of a slab (a
//! miss, which is an allocation too). A released buffer goes onto the free list (a return), or,
//! when the list is full, back to its slab (a drop). A slab with no slot out is unmapped.
//! The limit counts bytes handed out and bytes on free lists, not the untouched rest of slabs.
//!
//! What a buffer holds: a miss of `acquire` is zero; a hit is as its last holder left it, unless
//! `zero_on_release`. Pages hold anything: caches clear them.
//!
//! Called by abi.zig (host buffers) and tier.zig (pages), from any thread;
//! calls slab.zig. Tests: pool_test.zig.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const PoolStats = @import("abi.zig").PoolStats;
const Mutex = @import("sync.zig").Mutex;
const message = @import("message.zig");
const slab_file = @import("slab.zig");
const Slab = slab_file.Slab;
const Source = slab_file.Source;

pub const Options = struct {
    /// Free buffers kept per class; more are given back to their slab.
    max_free_per_class: u32 = 32,
    /// Hard limit on bytes handed out and kept free; 0 is no limit.
    max_bytes: u64 = 0,
    zero_on_release: bool = false,
};

pub const Error = error{
    /// The limit refuses: more buffers would have to be released first.
    PoolExhausted,
    /// The system refuses, or the size is beyond anything a system would grant.
    OutOfMemory,
};

pub const Page = [*]align(64) u8;

pub const public_class_bytes = [_]u32{ 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10 };

/// Larger requests are refused unseen, so that sums of sizes cannot overflow.
pub const buffer_bytes_max: u64 = if (@sizeOf(usize) == 8) 1 << 40 else 1 << 30;

// A class's first slab is small, each further one twice as large.
// The allocator of WebAssembly rounds up to a power of two with its own link word inside.
const is_wasm = builtin.target.cpu.arch.isWasm();
const slab_bytes_margin = if (is_wasm) 64 else 0;
const slab_bytes_first: usize = 64 << 10;
const slab_doublings_max = if (is_wasm) 2 else 5;
const slab_bytes_last = (slab_bytes_first << slab_doublings_max) - slab_bytes_margin;

comptime {
    if (!is_wasm) assert(slab_bytes_last == slab_file.huge_bytes);
    assert(slab_bytes_last / 64 <= Slab.slots_max);
}

/// Bytes of the buffer that `acquire` gives for a request: the smallest class that holds it, above
/// 256 KB whole 4 KB.
pub fn class_bytes(bytes: u64) error{OutOfMemory}!u64 {
    for (public_class_bytes) |class| {
        if (bytes <= class) return class;
    }
    if (bytes > buffer_bytes_max) return error.OutOfMemory;
    return std.mem.alignForward(u64, bytes, 4096);
}

/// Bytes of the page that `acquire_page` gives for a request.
pub fn page_bytes(bytes: usize) error{OutOfMemory}!usize {
    if (bytes > buffer_bytes_max) return error.OutOfMemory;
    return std.mem.alignForward(usize, @max(bytes, 1), 64);
}

/// One slot of one slab.
const Place = struct { slab: *Slab, slot: u32 };

/// All buffers of one size. Public classes and page classes are the same thing.
const Class = struct {
    slot_bytes: usize,
    slab_count: u32 = 0,
    slot_count: usize = 0,
    /// Last in, first out. Has capacity for every slot it may have to keep.
    idle: std.ArrayList(Place) = .empty,
    /// First of the slabs with room.
    roomy: ?*Slab = null,
};

pub const Pool = struct {
    gpa: Allocator,
    source: Source,
    options: Options,
    references: std.atomic.Value(u32),
    /// Where caches put pages that have no room here.
    spill: ?*@import("spill.zig").Spill = null,
    /// Guards everything below.
    mutex: Mutex,
    /// The public classes first; the others come and go with their slabs.
    classes: std.ArrayList(Class),
    /// By address.
    slabs: std.ArrayList(*Slab),
    /// What `stats` returns, except for the free buffers, which are counted there.
    counters: PoolStats,

    pub fn create(gpa: Allocator, options: Options) error{OutOfMemory}!*Pool {
        return create_with_source(gpa, .system, options);
    }

    /// The source is a parameter so that tests can make it fail.
    pub fn create_with_source(
        gpa: Allocator,
        source: Source,
        options: Options,
    ) error{OutOfMemory}!*Pool {
        const pool = try gpa.create(Pool);
        errdefer gpa.destroy(pool);
        pool.* = .{
            .gpa = gpa,
            .source = source,
            .options = options,
            .references = .init(1),
            .mutex = .{},
            .classes = try .initCapacity(gpa, public_class_bytes.len + 3),
            .slabs = .empty,
            .counters = .{ .max_bytes = options.max_bytes },
        };
        for (public_class_bytes) |bytes| {
            pool.classes.appendAssumeCapacity(.{ .slot_bytes = bytes });
        }
        return pool;
    }

    /// One more owner: a cache holds the pool that its pages come from.
    pub fn retain(pool: *Pool) void {
        const before = pool.references.fetchAdd(1, .monotonic);
        assert(before > 0);
    }

    /// The last owner's release frees every slab, whatever is still handed out.
    pub fn release(pool: *Pool) void {
        const before = pool.references.fetchSub(1, .acq_rel);
        assert(before > 0);
        if (before > 1) return;
        const gpa = pool.gpa;
        if (pool.spill) |spill| spill.destroy();
        for (pool.slabs.items) |slab| slab.destroy(gpa, pool.source);
        pool.slabs.deinit(gpa);
        for (pool.classes.items) |*class| class.idle.deinit(gpa);
        pool.classes.deinit(gpa);
        gpa.destroy(pool);
    }

    /// A buffer for the host, of `class_bytes(bytes)`.
    pub fn acquire(pool: *Pool, bytes: u64) Error![]align(64) u8 {
        const slot_bytes: usize = @intCast(try class_bytes(bytes));
        var out: [1]Page = undefined;
        const dirty = dirty: {
            pool.mutex.lock();
            defer pool.mutex.unlock();
            break :dirty try pool.acquire_slots(slot_bytes, Slab.state_host, &out);
        };
        const buffer = out[0][0..slot_bytes];
        if (dirty) @memset(buffer, 0);
        return buffer;
    }

    /// Takes back what `acquire` gave. Refuses every other address: pages of caches, the inside of
    /// a buffer, a buffer released before.
    pub fn release_buffer(pool: *Pool, pointer: ?*const anyopaque) error{ForeignBuffer}!void {
        pool.mutex.lock();
        defer pool.mutex.unlock();
        const place = pool.find(@intFromPtr(pointer)) orelse return error.ForeignBuffer;
        const state = &place.slab.slots[place.slot];
        if (state.* != Slab.state_host) return error.ForeignBuffer;
        state.* = Slab.state_idle; // a second release is refused from here on
        if (pool.options.zero_on_release) {
            // Clearing takes long and the slot is nobody else's: let others in meanwhile.
            pool.mutex.unlock();
            defer pool.mutex.lock();
            @memset(place.slab.slot_memory(place.slot), 0);
        }
        pool.put_back(place);
    }

    /// A page of exactly `bytes`, rounded up to 64.
    pub fn acquire_page(pool: *Pool, bytes: usize) Error!Page {
        var out: [1]Page = undefined;
        try pool.acquire_pages(bytes, &out);
        return out[0];
    }

    /// All pages or none, so that a cache can make its change after the only step that can fail.
    pub fn acquire_pages(pool: *Pool, bytes: usize, out: []Page) Error!void {
        const slot_bytes = try page_bytes(bytes);
        if (out.len == 0) return;
        pool.mutex.lock();
        defer pool.mutex.unlock();
        _ = try pool.acquire_slots(slot_bytes, Slab.state_page, out);
    }

    pub fn release_page(pool: *Pool, pointer: Page, bytes: usize) void {
        pool.release_pages(bytes, &.{pointer});
    }

    /// Takes back pages of `bytes` from `acquire_page` and `acquire_pages`.
    pub fn release_pages(pool: *Pool, bytes: usize, pages: []const Page) void {
        const slot_bytes = page_bytes(bytes) catch unreachable; // acquired with the same size
        if (pool.options.zero_on_release) {
            for (pages) |page| @memset(page[0..slot_bytes], 0);
        }
        pool.mutex.lock();
        defer pool.mutex.unlock();
        for (pages) |page| {
            const place = pool.find(@intFromPtr(page)).?;
            assert(place.slab.slot_bytes == slot_bytes);
            assert(place.slab.slots[place.slot] == Slab.state_page);
            pool.put_back(place);
        }
    }

    /// Puts `count` new buffers on the free list of the class of `bytes`, fewer if the list is full
    /// before. All or none. Counts as allocations.
    pub fn prewarm(pool: *Pool, bytes: u64, count: u64) Error!void {
        const slot_bytes: usize = @intCast(try class_bytes(bytes));
        pool.mutex.lock();
        defer pool.mutex.unlock();
        const index = try pool.class_of(slot_bytes);
        const idle_count: u64 = pool.classes.items[index].idle.items.len;
        const room = pool.options.max_free_per_class - idle_count;
        const wanted: usize = @intCast(@min(count, room));
        if (wanted == 0) return;

        const held_bytes = pool.counters.bytes_in_use + idle_count * slot_bytes;
        try pool.make_room(held_bytes, index, wanted * @as(u64, slot_bytes));
        for (0..wanted) |done| {
            const taken = pool.take(index, Slab.state_idle, wanted - done) catch |err| {
                for (0..done) |_| {
                    const place = pool.classes.items[index].idle.pop().?;
                    pool.counters.bytes_free -= slot_bytes;
                    pool.give_back(place);
                }
                return err;
            };
            pool.counters.bytes_free += slot_bytes;
            pool.classes.items[index].idle.appendAssumeCapacity(taken.place);
        }
        pool.counters.allocations += wanted;
    }

    /// Empties the free lists. Not counted as drops: those tell of lists that are too short.
    pub fn clear(pool: *Pool) void {
        pool.mutex.lock();
        defer pool.mutex.unlock();
        for (0..pool.classes.items.len) |index| {
            while (pool.pop_idle(index)) |place| pool.give_back(place);
        }
        assert(pool.counters.bytes_free == 0);
    }

    /// One consistent snapshot.
    pub fn stats(pool: *Pool) PoolStats {
        pool.mutex.lock();
        defer pool.mutex.unlock();
        var result = pool.counters;
        for (pool.classes.items, 0..) |*class, index| {
            const count = class.idle.items.len;
            switch (index) {
                0 => result.free_1k = count,
                1 => result.free_4k = count,
                2 => result.free_16k = count,
                3 => result.free_64k = count,
                4 => result.free_256k = count,
                else => result.free_pages += count,
            }
        }
        if (pool.spill) |spill| result.bytes_spilled, result.bytes_written = spill.counts();
        return result;
    }

    /// Fills `out` with slots, from the free list as far as that goes. All or none.
    /// True if a slot that did not come from the free list may hold what an earlier holder left.
    fn acquire_slots(pool: *Pool, slot_bytes: usize, state: u32, out: []Page) Error!bool {
        const index = try pool.class_of(slot_bytes);
        const hits = @min(out.len, pool.classes.items[index].idle.items.len);
        const misses = out.len - hits;
        const miss_bytes = misses *| @as(u64, slot_bytes);
        if (misses > 0) {
            // The whole free list of this class is about to be used: it is no room to be made.
            try pool.make_room(pool.counters.bytes_in_use + hits * slot_bytes, index, miss_bytes);
        }

        var dirty = false;
        for (out[0..misses], 0..) |*page, done| {
            const taken = pool.take(index, state, misses - done) catch |err| {
                for (out[0..done]) |page_done| {
                    pool.counters.bytes_in_use -= slot_bytes;
                    pool.give_back(pool.find(@intFromPtr(page_done)).?);
                }
                return err;
            };
            pool.counters.bytes_in_use += slot_bytes;
            if (!taken.untouched) dirty = !pool.options.zero_on_release;
            page.* = taken.place.slab.slot_memory(taken.place.slot).ptr;
        }
        for (out[misses..]) |*page| {
            const place = pool.pop_idle(index).?;
            pool.counters.bytes_in_use += slot_bytes;
            place.slab.slots[place.slot] = state;
            page.* = place.slab.slot_memory(place.slot).ptr;
        }

        const counters = &pool.counters;
        counters.hits += hits;
        counters.misses += misses;
        counters.allocations += misses;
        counters.bytes_high_water = @max(counters.bytes_high_water, counters.bytes_in_use);
        return dirty;
    }

    /// Makes `new_bytes` fit under the limit by dropping idle buffers, but not of class `index`.
    /// `held_bytes` are those that cannot be dropped. Refuses before it drops anything.
    fn make_room(pool: *Pool, held_bytes: u64, index: usize, new_bytes: u64) Error!void {
        const max_bytes = pool.options.max_bytes;
        if (max_bytes == 0) return;
        const counters = &pool.counters;
        if (held_bytes +| new_bytes > max_bytes) {
            const text = "no room in the pool for {d} bytes more: max_bytes is {d}, {d} in use";
            message.set(text, .{
                new_bytes, max_bytes, counters.bytes_in_use,
            });
            return error.PoolExhausted;
        }
        for (pool.classes.items, 0..) |_, victim| {
            if (victim == index) continue;
            while (counters.bytes_in_use + counters.bytes_free + new_bytes > max_bytes) {
                const place = pool.pop_idle(victim) orelse break;
                pool.give_back(place);
                counters.drops += 1;
            }
        }
        assert(counters.bytes_in_use + counters.bytes_free + new_bytes <= max_bytes);
    }

    /// Onto the free list, or back to the slab when the list is full. Never allocates.
    fn put_back(pool: *Pool, place: Place) void {
        const class = &pool.classes.items[place.slab.class_index];
        pool.counters.bytes_in_use -= class.slot_bytes;
        if (class.idle.items.len < pool.options.max_free_per_class) {
            place.slab.slots[place.slot] = Slab.state_idle;
            class.idle.appendAssumeCapacity(place);
            pool.counters.bytes_free += class.slot_bytes;
            pool.counters.returns += 1;
        } else {
            pool.give_back(place);
            pool.counters.drops += 1;
        }
    }

    fn pop_idle(pool: *Pool, index: usize) ?Place {
        const class = &pool.classes.items[index];
        const place = class.idle.pop() orelse return null;
        assert(place.slab.slots[place.slot] == Slab.state_idle);
        pool.counters.bytes_free -= class.slot_bytes;
        return place;
    }

    /// Entry of the class of `slot_bytes`. One whose slabs are all gone is free for another size.
    fn class_of(pool: *Pool, slot_bytes: usize) error{OutOfMemory}!u32 {
        assert(slot_bytes > 0 and slot_bytes % 64 == 0);
        var reusable: ?*Class = null;
        for (pool.classes.items, 0..) |*class, index| {
            if (class.slot_bytes == slot_bytes) return @intCast(index);
            if (index >= public_class_bytes.len and class.slab_count == 0) reusable = class;
        }
        const class = reusable orelse new: {
            const class = try pool.classes.addOne(pool.gpa);
            class.* = .{ .slot_bytes = 0 };
            break :new class;
        };
        assert(class.idle.items.len == 0 and class.slot_count == 0 and class.roomy == null);
        class.slot_bytes = slot_bytes;
        return @intCast(class - pool.classes.items.ptr);
    }

    const Taken = struct { place: Place, untouched: bool };

    /// A slot of a slab with room, or of a new slab. `wanted` slots are going to be taken.
    fn take(pool: *Pool, index: u32, state: u32, wanted: usize) error{OutOfMemory}!Taken {
        const class = &pool.classes.items[index];
        if (class.roomy == null) {
            const count = pool.slab_slots(class, wanted);
            pool.add_slab(index, count) catch |err| {
                if (count == 1) return err;
                try pool.add_slab(index, 1); // the system may still grant a smaller one
            };
        }
        const slab = class.roomy.?;
        const taken = slab.take(state);
        if (!slab.has_room()) unlink(class, slab);
        return .{ .place = .{ .slab = slab, .slot = taken.slot }, .untouched = taken.untouched };
    }

    /// Slots of the next slab: each slab of a class is twice the one before. No more than what is
    /// left under the limit can ever be used.
    fn slab_slots(pool: *const Pool, class: *const Class, wanted: usize) u32 {
        const doublings: u5 = @intCast(@min(class.slab_count, slab_doublings_max));
        const grown_bytes: usize = (slab_bytes_first << doublings) - slab_bytes_margin;
        const wanted_bytes = @min(wanted *| class.slot_bytes, slab_bytes_last);
        var count: u64 = @max(grown_bytes, wanted_bytes) / class.slot_bytes;
        if (pool.options.max_bytes != 0) {
            const held_bytes = pool.counters.bytes_in_use + pool.counters.bytes_free;
            assert(held_bytes <= pool.options.max_bytes);
            count = @min(count, (pool.options.max_bytes - held_bytes) / class.slot_bytes);
        }
        return @intCast(@max(count, 1));
    }

    fn add_slab(pool: *Pool, index: u32, slot_count: u32) error{OutOfMemory}!void {
        const class = &pool.classes.items[index];
        // Everything that can fail comes first; a release must never have to allocate.
        const idle_max = @min(pool.options.max_free_per_class, class.slot_count + slot_count);
        try class.idle.ensureTotalCapacity(pool.gpa, idle_max);
        try pool.slabs.ensureUnusedCapacity(pool.gpa, 1);
        const slab = try Slab.create(pool.gpa, pool.source, index, class.slot_bytes, slot_count);

        if (slab.advise_huge()) pool.counters.huge_pages = 1;
        pool.slabs.insertAssumeCapacity(pool.slab_rank(@intFromPtr(slab.memory.ptr)), slab);
        link(class, slab);
        class.slab_count += 1;
        class.slot_count += slot_count;
        pool.counters.bytes_reserved += slab.memory.len;
    }

    /// Returns a slot to its slab, and the slab to the system if that was its last.
    fn give_back(pool: *Pool, place: Place) void {
        const slab = place.slab;
        const class = &pool.classes.items[slab.class_index];
        if (!slab.has_room()) link(class, slab);
        slab.give_back(place.slot);
        if (slab.slots_out > 0) return;

        unlink(class, slab);
        const rank = pool.slab_rank(@intFromPtr(slab.memory.ptr)) - 1;
        const removed = pool.slabs.orderedRemove(rank);
        assert(removed == slab);
        class.slab_count -= 1;
        class.slot_count -= slab.slots.len;
        pool.counters.bytes_reserved -= slab.memory.len;
        slab.destroy(pool.gpa, pool.source);
    }

    fn find(pool: *const Pool, address: usize) ?Place {
        const rank = pool.slab_rank(address);
        if (rank == 0) return null;
        const slab = pool.slabs.items[rank - 1];
        const slot = slab.slot_at(address) orelse return null;
        return .{ .slab = slab, .slot = slot };
    }

    /// Number of slabs that begin at or below `address`.
    fn slab_rank(pool: *const Pool, address: usize) usize {
        var low: usize = 0;
        var high: usize = pool.slabs.items.len;
        while (low < high) {
            const middle = low + (high - low) / 2;
            if (@intFromPtr(pool.slabs.items[middle].memory.ptr) <= address) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

fn link(class: *Class, slab: *Slab) void {
    assert(slab.previous == null and slab.next == null and class.roomy != slab);
    slab.next = class.roomy;
    if (class.roomy) |first| first.previous = slab;
    class.roomy = slab;
}

fn unlink(class: *Class, slab: *Slab) void {
    if (slab.next) |next| next.previous = slab.previous;
    if (slab.previous) |previous| {
        previous.next = slab.next;
    } else {
        assert(class.roomy == slab);
        class.roomy = slab.next;
    }
    slab.previous = null;
    slab.next = null;
}

test {
    _ = @import("pool_test.zig");
}
