//! Locks for threads that belong to a host process: any thread may take them, none is registered.
//!
//! They stand on the kernel's futex and nothing else. `std.Io` has the same locks, but on Windows
//! its futex keeps the waiter on the waiting thread's stack and trusts that nobody else ever alerts
//! that thread, which holds in a program of our own and not inside a host; and a safe build that
//! names it links all of `std.Io.Threaded` (250 KB). Single-threaded builds compile to nothing.
//! A child of fork() inherits a lock as it was: do not fork while another thread is in a call.
//!
//! Called by cache.zig, pool.zig, threads.zig; calls the operating system.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const Value = std.atomic.Value;

pub const enabled = !builtin.single_threaded;

/// Not recursive and not fair. Whoever is inside does no more than bookkeeping and a system call,
/// so a waiter spins for a moment before it sleeps.
pub const Mutex = struct {
    state: Value(u32) = .init(unlocked),

    const unlocked = 0;
    const locked = 1;
    /// Locked, and somebody may sleep: unlock has to wake.
    const contended = 2;
    const spins_max = 100;

    pub fn lock(mutex: *Mutex) void {
        if (!enabled) return;
        if (!mutex.tryLock()) mutex.lock_slow();
    }

    pub fn tryLock(mutex: *Mutex) bool {
        if (!enabled) return true;
        return mutex.state.cmpxchgStrong(unlocked, locked, .acquire, .monotonic) == null;
    }

    pub fn unlock(mutex: *Mutex) void {
        if (!enabled) return;
        const before = mutex.state.swap(unlocked, .release);
        assert(before != unlocked);
        // From here on another thread may have freed the mutex: the wake passes only its address.
        if (before == contended) futex_wake(&mutex.state, 1);
    }

    fn lock_slow(mutex: *Mutex) void {
        @branchHint(.cold);
        for (0..spins_max) |_| {
            std.atomic.spinLoopHint();
            if (mutex.state.load(.monotonic) != unlocked) continue;
            if (mutex.state.cmpxchgWeak(unlocked, locked, .acquire, .monotonic) == null) return;
        }
        while (mutex.state.swap(contended, .acquire) != unlocked) {
            futex_wait(&mutex.state, contended);
        }
    }
};

/// Many readers or one writer. A waiting writer keeps new readers out, so writers do not starve;
/// for the same reason a thread that holds the lock shared must not take it shared again.
pub const RwLock = struct {
    /// Held by the writer, and for a moment by readers that found a writer. It is what turns of
    /// writers, and the readers behind them, queue on.
    queue: Mutex = .{},
    /// Readers inside, and `writer_bit` once a writer waits for them to leave or is inside.
    state: Value(u32) = .init(0),

    const writer_bit: u32 = 1 << 31;

    pub fn lock(rw: *RwLock) void {
        if (!enabled) return;
        rw.queue.lock();
        var state = rw.state.fetchOr(writer_bit, .acquire) | writer_bit;
        while (state != writer_bit) {
            futex_wait(&rw.state, state);
            state = rw.state.load(.acquire);
        }
    }

    pub fn unlock(rw: *RwLock) void {
        if (!enabled) return;
        assert(rw.state.load(.monotonic) == writer_bit);
        rw.state.store(0, .release);
        rw.queue.unlock();
    }

    pub fn lockShared(rw: *RwLock) void {
        if (!enabled) return;
        var state = rw.state.load(.monotonic);
        while (state & writer_bit == 0) {
            state = rw.state.cmpxchgWeak(state, state + 1, .acquire, .monotonic) orelse return;
        }
        rw.queue.lock();
        // Only the holder of the queue sets the writer bit, so it is clear now.
        const before = rw.state.fetchAdd(1, .acquire);
        assert(before & writer_bit == 0);
        rw.queue.unlock();
    }

    pub fn unlockShared(rw: *RwLock) void {
        if (!enabled) return;
        const before = rw.state.fetchSub(1, .release);
        assert(before & ~writer_bit != 0);
        // Only the writer sleeps on this word, and only the last reader lets it in.
        if (before == writer_bit + 1) futex_wake(&rw.state, 1);
    }
};

/// Sleeps while `word` holds `expect`. May return early for no reason at all: callers loop.
pub fn futex_wait(word: *const Value(u32), expect: u32) void {
    comptime assert(enabled);
    switch (builtin.os.tag) {
        .linux => {
            const operation: std.os.linux.FUTEX_OP = .{ .cmd = .WAIT, .private = true };
            _ = std.os.linux.futex_4arg(&word.raw, operation, expect, null);
        },
        .macos => {
            const operation: std.c.UL = .{ .op = .COMPARE_AND_WAIT, .NO_ERRNO = true };
            // The second function is what the system libraries use since macOS 11.
            if (comptime builtin.os.version_range.semver.min.major >= 11) {
                _ = std.c.__ulock_wait2(operation, &word.raw, expect, 0, 0);
            } else {
                _ = std.c.__ulock_wait(operation, &word.raw, expect, 0);
            }
        },
        .windows => {
            _ = std.os.windows.ntdll.RtlWaitOnAddress(&word.raw, &expect, @sizeOf(u32), null);
        },
        else => @compileError("no futex known for this operating system"),
    }
}

/// Wakes up to `waiters_max` of the threads that sleep on `word`.
/// Nothing is read through the address, so the memory may be gone already.
pub fn futex_wake(word: *const Value(u32), waiters_max: u32) void {
    comptime assert(enabled);
    assert(waiters_max > 0);
    switch (builtin.os.tag) {
        .linux => {
            const operation: std.os.linux.FUTEX_OP = .{ .cmd = .WAKE, .private = true };
            const count = @min(waiters_max, std.math.maxInt(i32));
            _ = std.os.linux.futex_3arg(&word.raw, operation, count);
        },
        .macos => {
            const operation: std.c.UL = .{
                .op = .COMPARE_AND_WAIT,
                .NO_ERRNO = true,
                .WAKE_ALL = waiters_max > 1,
            };
            const interrupted = -@as(c_int, @backingInt(std.c.E.INTR));
            while (std.c.__ulock_wake(operation, &word.raw, 0) == interrupted) {}
        },
        .windows => if (waiters_max == 1) {
            std.os.windows.ntdll.RtlWakeAddressSingle(&word.raw);
        } else {
            std.os.windows.ntdll.RtlWakeAddressAll(&word.raw);
        },
        else => @compileError("no futex known for this operating system"),
    }
}

const Contention = struct {
    mutex: Mutex = .{},
    rw: RwLock = .{},
    counter: u64 = 0,
    pair: [2]u64 = .{ 0, 0 },
    torn: Value(u32) = .init(0),
    stop: Value(bool) = .init(false),

    fn count(contention: *Contention, rounds: u32) void {
        for (0..rounds) |_| {
            contention.mutex.lock();
            defer contention.mutex.unlock();
            contention.counter += 1;
        }
    }

    fn write(contention: *Contention, rounds: u32) void {
        for (0..rounds) |_| {
            contention.rw.lock();
            defer contention.rw.unlock();
            contention.pair[0] += 1;
            std.atomic.spinLoopHint();
            contention.pair[1] += 1;
        }
    }

    fn read_until_stopped(contention: *Contention) void {
        while (!contention.stop.load(.monotonic)) contention.read();
    }

    fn read(contention: *Contention) void {
        contention.rw.lockShared();
        defer contention.rw.unlockShared();
        if (contention.pair[0] != contention.pair[1]) _ = contention.torn.fetchAdd(1, .monotonic);
    }
};

test "mutex: no increment is lost" {
    if (!enabled) return error.SkipZigTest;
    const rounds = 20_000;
    var contention: Contention = .{};
    var threads: [4]std.Thread = undefined;
    for (&threads) |*thread| {
        thread.* = try std.Thread.spawn(.{}, Contention.count, .{ &contention, rounds });
    }
    for (threads) |thread| thread.join();
    try std.testing.expectEqual(threads.len * rounds, contention.counter);
}

test "rwlock: readers see whole writes, and writers get in between endless readers" {
    if (!enabled) return error.SkipZigTest;
    const rounds = 1_000;
    var contention: Contention = .{};
    var readers: [3]std.Thread = undefined;
    var writers: [2]std.Thread = undefined;
    for (&readers) |*thread| {
        thread.* = try std.Thread.spawn(.{}, Contention.read_until_stopped, .{&contention});
    }
    for (&writers) |*thread| {
        thread.* = try std.Thread.spawn(.{}, Contention.write, .{ &contention, rounds });
    }
    for (writers) |thread| thread.join();
    contention.stop.store(true, .monotonic);
    for (readers) |thread| thread.join();
    try std.testing.expectEqual(writers.len * rounds, contention.pair[0]);
    try std.testing.expectEqual(0, contention.torn.load(.monotonic));
    try std.testing.expectEqual(0, contention.rw.state.load(.monotonic));
}

test "rwlock: two readers at once" {
    var rw: RwLock = .{};
    rw.lockShared();
    rw.lockShared();
    rw.unlockShared();
    rw.unlockShared();
    rw.lock();
    rw.unlock();
    try std.testing.expectEqual(0, rw.state.load(.monotonic));
}
