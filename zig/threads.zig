//! Worker threads for jobs of 50 to 500 microseconds: spin for a moment, then park on a futex.
//!
//! One 64-bit ticket is the whole state of a job, and a task is claimed with one CAS on it. So a
//! worker that comes late cannot run a task of a finished job nor hold up its caller, who waits for
//! claimed tasks only. There is one crew per process; who finds it busy runs its tasks itself, with
//! the same results. Workers start at the first job that can use them, never end by themselves and
//! never hold up the process's exit: parked or not, the system ends them with it.
//! A child of fork() has no workers left: it notices by its process id and starts its own.
//! Single-threaded builds (WebAssembly) run a plain loop.
//!
//! Called by attend.zig (run), abi.zig (counts); calls sync.zig.

const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const sync = @import("sync.zig");
const Value = std.atomic.Value;

pub const enabled = sync.enabled;

/// Caller included.
pub const count_max = 256;

/// Below this many values to read or write, waking other threads costs more than it gains.
pub const parallel_values_min = 1 << 18;

pub const Task = *const fn (context: *anyopaque, task: u32) void;

/// Runs `task_function(context, 0 .. tasks - 1)`, each exactly once, in no particular order and on
/// this thread among others; returns when all are done. A call from inside a task runs here alone.
pub fn run(tasks: u32, context: *anyopaque, task_function: Task) void {
    if (run_with_crew(tasks, context, task_function)) return;
    for (0..tasks) |task| task_function(context, @intCast(task));
}

/// Equal parts of a number of things, of which each of several threads gets a few.
pub const Parts = struct {
    things: usize,
    each: usize,

    const per_thread = 4;

    pub fn of(things: usize, workers: usize) Parts {
        const most = if (workers > 1) workers * per_thread else 1;
        return .{ .things = things, .each = @max(1, (things + most - 1) / most) };
    }

    pub fn count(parts: *const Parts) u32 {
        return @intCast((parts.things + parts.each - 1) / parts.each);
    }

    pub fn part(parts: *const Parts, index: u32) [2]usize {
        const first = index * parts.each;
        return .{ first, @min(first + parts.each, parts.things) };
    }
};

/// Threads that a job may use, its caller included.
pub fn thread_count() u32 {
    if (!enabled) return 1;
    const chosen = count_chosen.load(.monotonic);
    if (chosen > 0) return chosen;
    const count = @min(cpu_count(), count_max);
    // Whoever is first decides; a count that was set meanwhile stays.
    return count_chosen.cmpxchgStrong(0, count, .monotonic, .monotonic) orelse count;
}

/// More threads start when a job needs them; surplus ones are gone when this returns. From inside a
/// task only the number changes.
pub fn set_thread_count(count: u32) void {
    assert(count >= 1 and count <= count_max);
    if (!enabled) return;
    count_chosen.store(count, .monotonic);
    if (inside_job or !crew.in_this_process()) return;
    crew.lock.lock();
    defer crew.lock.unlock();
    crew.start_refused = false;
    crew.dismiss(thread_count() - 1);
}

/// Cores this process may use. Sibling threads of a core count once where the system tells (Linux,
/// macOS), because attention fills the units they share; efficiency cores of Apple do not count.
pub fn cpu_count() u32 {
    if (!enabled) return 1;
    if (builtin.os.tag == .macos) {
        for ([_][*:0]const u8{ "hw.perflevel0.physicalcpu", "hw.physicalcpu" }) |name| {
            var count: c_int = 0;
            var count_bytes: usize = @sizeOf(c_int);
            const result = std.c.sysctlbyname(name, &count, &count_bytes, null, 0);
            if (result == 0 and count > 0) return @intCast(count);
        }
    }
    const logical: u32 = @intCast(std.Thread.getCpuCount() catch return 1);
    return if (siblings_active()) @max(1, logical / 2) else logical;
}

fn siblings_active() bool {
    if (builtin.os.tag != .linux) return false;
    const linux = std.os.linux;
    const opened = linux.open("/sys/devices/system/cpu/smt/active", .{ .CLOEXEC = true }, 0);
    if (linux.errno(opened) != .SUCCESS) return false;
    const file: linux.fd_t = @intCast(opened);
    defer _ = linux.close(file);
    var text: [1]u8 = undefined;
    return linux.read(file, &text, 1) == 1 and text[0] == '1';
}

/// 0 until somebody asks.
var count_chosen: Value(u32) = .init(0);
var crew: Crew = .{};
/// This thread is a worker, or waits for a job of the crew.
threadlocal var inside_job: bool = false;

fn run_with_crew(tasks: u32, context: *anyopaque, task_function: Task) bool {
    if (!enabled) return false;
    if (tasks < 2 or inside_job) return false;
    const count = thread_count();
    if (count == 1 or !crew.in_this_process()) return false;
    if (!crew.lock.tryLock()) return false;
    defer crew.lock.unlock();
    crew.hire(@min(tasks, count) - 1);
    if (crew.worker_count == 0) return false;
    inside_job = true;
    defer inside_job = false;
    crew.work(tasks, context, task_function);
    return true;
}

const Crew = struct {
    /// Tasks `tasks - remaining ..` of job `epoch` are still to be claimed.
    const Ticket = packed struct(u64) { remaining: u32, epoch: u32 };

    // About 100 us and 1 ms on x86; a wake costs 10 to 30 us.
    const worker_spins_max = 4_000;
    const caller_spins_max = 20_000;
    const stack_bytes = 1 << 20;

    ticket: Value(u64) align(std.atomic.cache_line) = .init(0),
    /// Steps with every job and every dismissal; workers sleep on it.
    epoch: Value(u32) = .init(0),
    workers_asleep: Value(u32) = .init(0),
    /// Workers from this index on leave.
    workers_kept: Value(u32) = .init(0),
    // Of the present job; who has claimed a task may read them until it reports the task done.
    task_function: Task = undefined,
    context: *anyopaque = undefined,
    tasks: u32 = 0,

    /// Tasks done; the caller sleeps on it.
    tasks_done: Value(u32) align(std.atomic.cache_line) = .init(0),
    caller_asleep: Value(u32) = .init(0),

    /// Held by the thread whose job this is. It owns everything below and publishes the above.
    lock: sync.Mutex align(std.atomic.cache_line) = .{},
    worker_count: u32 = 0,
    /// The system would not start a thread: do not ask again with every job.
    start_refused: bool = false,
    workers: [count_max - 1]if (enabled) std.Thread else void = undefined,

    /// Id of the process whose threads the workers are; 0 at first.
    process: Value(i32) = .init(0),
    const process_changing = -1;

    /// False while another thread finds out that the process has changed.
    fn in_this_process(self: *Crew) bool {
        const id: i32 = switch (builtin.os.tag) {
            .linux => std.os.linux.getpid(),
            .windows => 1, // no fork
            else => std.c.getpid(),
        };
        const known = self.process.load(.acquire);
        if (known == id) return true;
        if (known == process_changing) return false;
        if (self.process.cmpxchgStrong(known, process_changing, .acquire, .monotonic) != null) {
            return false;
        }
        // The memory is the parent's, with a job half done and the lock taken, perhaps.
        self.lock = .{};
        self.worker_count = 0;
        self.workers_kept.store(0, .monotonic);
        self.workers_asleep.store(0, .monotonic);
        self.caller_asleep.store(0, .monotonic);
        self.ticket.store(0, .monotonic);
        self.start_refused = false;
        self.process.store(id, .release);
        return true;
    }

    /// Starts workers until there are `count`, if the system lets us.
    fn hire(self: *Crew, count: u32) void {
        while (self.worker_count < count and !self.start_refused) {
            const index = self.worker_count;
            self.workers_kept.store(index + 1, .monotonic);
            const config: std.Thread.SpawnConfig = .{ .stack_size = stack_bytes };
            self.workers[index] = std.Thread.spawn(config, worker_main, .{ self, index }) catch {
                self.workers_kept.store(index, .monotonic);
                self.start_refused = true;
                return;
            };
            self.worker_count += 1;
        }
    }

    /// Ends and joins all workers but the first `count`.
    fn dismiss(self: *Crew, count: u32) void {
        if (self.worker_count <= count) return;
        self.workers_kept.store(count, .monotonic);
        _ = self.epoch.fetchAdd(1, .seq_cst);
        if (self.workers_asleep.load(.seq_cst) > 0) {
            sync.futex_wake(&self.epoch, std.math.maxInt(u32));
        }
        for (self.workers[count..self.worker_count]) |worker| worker.join();
        self.worker_count = count;
    }

    fn work(self: *Crew, tasks: u32, context: *anyopaque, task_function: Task) void {
        self.task_function = task_function;
        self.context = context;
        self.tasks = tasks;
        self.tasks_done.store(0, .monotonic);
        const epoch = self.epoch.load(.monotonic) +% 1;
        const ticket: Ticket = .{ .remaining = tasks, .epoch = epoch };
        self.ticket.store(@bitCast(ticket), .release);
        self.epoch.store(epoch, .seq_cst);
        // Either a worker that falls asleep sees the new epoch, or we see that it is asleep.
        if (self.workers_asleep.load(.seq_cst) > 0) sync.futex_wake(&self.epoch, tasks - 1);
        while (self.run_one()) {}
        self.wait_until_done(tasks);
    }

    fn wait_until_done(self: *Crew, tasks: u32) void {
        var spins: u32 = 0;
        while (true) {
            const done = self.tasks_done.load(.acquire);
            assert(done <= tasks);
            if (done == tasks) return;
            if (spins < caller_spins_max) {
                spins += 1;
                std.atomic.spinLoopHint();
                continue;
            }
            self.caller_asleep.store(1, .seq_cst);
            // Not woken before the last task: on the way down the count may still change, then
            // this returns at once.
            if (self.tasks_done.load(.seq_cst) == done) sync.futex_wait(&self.tasks_done, done);
            self.caller_asleep.store(0, .monotonic);
        }
    }

    /// Claims a task and runs it; false if there is none.
    fn run_one(self: *Crew) bool {
        var seen = self.ticket.load(.acquire);
        while (true) {
            var ticket: Ticket = @bitCast(seen);
            if (ticket.remaining == 0) return false;
            const remaining = ticket.remaining;
            ticket.remaining -= 1;
            if (self.ticket.cmpxchgWeak(seen, @bitCast(ticket), .acq_rel, .acquire)) |now| {
                seen = now;
                continue;
            }
            // Claimed: the job cannot end before this task is reported, so its fields stand still.
            const tasks = self.tasks;
            self.task_function(self.context, tasks - remaining);
            const done = self.tasks_done.fetchAdd(1, .seq_cst) + 1;
            if (done == tasks and self.caller_asleep.load(.seq_cst) != 0) {
                sync.futex_wake(&self.tasks_done, 1);
            }
            return true;
        }
    }

    fn worker_main(self: *Crew, index: u32) void {
        inside_job = true;
        while (true) {
            // Read before looking for work: what is published later differs from it.
            const epoch = self.epoch.load(.acquire);
            if (index >= self.workers_kept.load(.monotonic)) return;
            while (self.run_one()) {}
            self.wait_for_change(epoch);
        }
    }

    fn wait_for_change(self: *Crew, epoch: u32) void {
        for (0..worker_spins_max) |_| {
            if (self.epoch.load(.acquire) != epoch) return;
            std.atomic.spinLoopHint();
        }
        _ = self.workers_asleep.fetchAdd(1, .seq_cst);
        while (self.epoch.load(.seq_cst) == epoch) sync.futex_wait(&self.epoch, epoch);
        _ = self.workers_asleep.fetchSub(1, .seq_cst);
    }
};

/// Counts how often each task ran, and on how many threads.
const Tally = struct {
    runs: [97]Value(u32) = @splat(.init(0)),
    work: u32 = 0,
    nested: bool = false,

    fn task(context: *anyopaque, index: u32) void {
        const tally: *Tally = @ptrCast(@alignCast(context));
        for (0..tally.work) |_| std.atomic.spinLoopHint();
        if (tally.nested) {
            var inner: Tally = .{};
            run(3, &inner, task);
            for (inner.runs[0..3]) |*runs| assert(runs.load(.monotonic) == 1);
        }
        _ = tally.runs[index].fetchAdd(1, .monotonic);
    }

    /// One job; false if a task did not run exactly once.
    fn once(tasks: u32, work: u32, nested: bool) bool {
        var tally: Tally = .{ .work = work, .nested = nested };
        run(tasks, &tally, task);
        for (&tally.runs, 0..) |*runs, index| {
            if (runs.load(.monotonic) != @intFromBool(index < tasks)) return false;
        }
        return true;
    }

    fn many(jobs: u32, failed: *Value(u32)) void {
        for (0..jobs) |job| {
            const tasks: u32 = @intCast(job % 98);
            const good = once(tasks, @intCast(job % 7 * 10), job % 5 == 0);
            if (!good) _ = failed.fetchAdd(1, .monotonic);
        }
    }
};

test "threads: every task runs once, whatever the number of threads" {
    for ([_]u32{ 1, 2, 5, 3, 8, 1, 4 }) |count| {
        set_thread_count(count);
        try std.testing.expectEqual(if (enabled) count else 1, thread_count());
        if (enabled) try std.testing.expect(crew.worker_count < count);
        for (0..200) |job| try std.testing.expect(Tally.once(@intCast(job % 98), 0, false));
        if (enabled) try std.testing.expectEqual(count - 1, crew.worker_count);
    }
    set_thread_count(1);
    try std.testing.expectEqual(0, crew.worker_count);
}

test "threads: parked workers wake up, and a slow worker wakes its caller" {
    if (!enabled) return error.SkipZigTest;
    set_thread_count(3);
    defer set_thread_count(1);
    for (0..20) |_| {
        try std.testing.expect(Tally.once(6, 20_000, false));
        for (0..10_000) |_| std.atomic.spinLoopHint(); // longer than workers spin
    }
}

test "threads: a call from inside a task runs there" {
    set_thread_count(4);
    defer set_thread_count(1);
    for (0..50) |_| try std.testing.expect(Tally.once(97, 0, true));
}

test "threads: callers at once, while the number of threads changes" {
    if (!enabled) return error.SkipZigTest;
    set_thread_count(3);
    defer set_thread_count(1);
    var failed: Value(u32) = .init(0);
    var callers: [3]std.Thread = undefined;
    for (&callers) |*caller| {
        caller.* = try std.Thread.spawn(.{}, Tally.many, .{ 600, &failed });
    }
    for (0..60) |step| set_thread_count(@intCast(1 + step % 4));
    for (callers) |caller| caller.join();
    try std.testing.expectEqual(0, failed.load(.monotonic));
}

test "threads: a child of fork starts its own workers" {
    if (!enabled or !builtin.link_libc or builtin.os.tag == .windows) return error.SkipZigTest;
    if (builtin.sanitize_thread) return error.SkipZigTest; // it forbids threads after fork
    if (@import("options").emulated) return error.SkipZigTest; // qemu-user cannot start them either
    set_thread_count(3);
    defer set_thread_count(1);
    try std.testing.expect(Tally.once(50, 100, false));
    crew.lock.lock(); // as if another thread were in the middle of a job
    const child = std.c.fork();
    if (child == 0) {
        const good = Tally.once(50, 100, false) and crew.worker_count == 2;
        std.c._exit(if (good) 0 else 1);
    }
    crew.lock.unlock();
    try std.testing.expect(child > 0);
    var status: c_int = -1;
    try std.testing.expectEqual(child, std.c.waitpid(child, &status, 0));
    try std.testing.expectEqual(0, status);
    try std.testing.expect(Tally.once(50, 100, false));
}
