//! Attention over several caches in one fork-join: the tasks of all requests are one list, the
//! longest first, so that threads are busy to the end whatever the lengths. The tasks are those of
//! `attend`, and with them the bits. Called by abi_sequence.zig; calls attend.zig and threads.zig.
const std = @import("std");
const assert = std.debug.assert;
const attend = @import("attend.zig");
const gpa = @import("memory.zig").gpa;
const request_file = @import("request.zig");
const scratch = @import("scratch.zig");
const threads = @import("threads.zig");
const Cache = @import("cache.zig").Cache;
const Job = attend.Job;

pub const Item = struct { cache: *Cache, request: request_file.Request };

/// Tasks of a thread on average, where there are enough: then the last ones end together.
const tasks_per_worker = 4;

/// Attends for every item, or for none; `failed` tells which one is to blame.
pub fn attend_many(items: []const Item, failed: *usize) request_file.Error!void {
    for (items, 0..) |*item, i| {
        failed.* = i;
        try request_file.check(item.cache, &item.request);
    }
    var held: Locked = try .init(items);
    defer held.deinit();
    for (items, 0..) |*item, i| {
        failed.* = i;
        try request_file.check_held(item.cache, &item.request);
    }
    var batch: Batch = try .init(items);
    defer batch.deinit();
    try batch.run();
}

/// The caches of a call, each locked once, in the order of their addresses.
const Locked = struct {
    caches: []*Cache,

    fn init(items: []const Item) error{OutOfMemory}!Locked {
        const caches = try gpa.alloc(*Cache, items.len);
        for (caches, items) |*cache, item| cache.* = item.cache;
        std.mem.sort(*Cache, caches, {}, Cache.before);
        for (caches, 0..) |cache, i| {
            if (i == 0 or caches[i - 1] != cache) cache.lock.lockShared();
        }
        return .{ .caches = caches };
    }

    fn deinit(locked: *Locked) void {
        for (locked.caches, 0..) |cache, i| {
            if (i == 0 or locked.caches[i - 1] != cache) cache.lock.unlockShared();
        }
        gpa.free(locked.caches);
    }
};

const Batch = struct {
    /// Those with something to do, in the order in which their tasks are claimed.
    jobs: []Job,
    /// (job): its first task in the common list.
    first_task: []u32,

    fn init(items: []const Item) error{OutOfMemory}!Batch {
        var count: usize = 0;
        for (items) |*item| count += @intFromBool(item.request.query_tokens > 0);
        const jobs = try gpa.alloc(Job, count);
        errdefer gpa.free(jobs);
        const first_task = try gpa.alloc(u32, count);
        var next: usize = 0;
        for (items) |*item| {
            if (item.request.query_tokens == 0) continue;
            jobs[next] = .plan(item.cache, &item.request);
            next += 1;
        }
        assert(next == count);
        std.mem.sort(Job, jobs, {}, longer_tasks);
        return .{ .jobs = jobs, .first_task = first_task };
    }

    fn deinit(batch: *Batch) void {
        gpa.free(batch.first_task);
        gpa.free(batch.jobs);
    }

    /// Bytes that one task reads, if the job is not split.
    fn task_bytes(job: *const Job) usize {
        return job.bytes / job.cache.config.num_kv_heads;
    }

    fn longer_tasks(_: void, a: Job, b: Job) bool {
        return task_bytes(&a) > task_bytes(&b);
    }

    fn run(batch: *Batch) error{OutOfMemory}!void {
        var bytes: usize = 0;
        for (batch.jobs) |*job| bytes +|= job.bytes *| job.blocks;
        const workers = attend.workers_for(bytes);
        const share = bytes / (workers * tasks_per_worker);
        var tasks: usize = 0;
        var lane_floats: usize = 0;
        var partial_floats: usize = 0;
        for (batch.jobs, batch.first_task) |*job, *first| {
            job.split = workers > 1 and job.units > 1 and task_bytes(job) > share;
            first.* = @intCast(tasks);
            tasks += job.tasks();
            lane_floats = @max(lane_floats, job.lane_floats());
            partial_floats += job.partial_floats();
        }
        if (tasks == 0) return;
        const lane_count = @min(workers, tasks);
        const memory = try scratch.acquire(lane_count * lane_floats + partial_floats);
        defer scratch.release(memory);
        var lanes: scratch.Lanes = .init(memory[0 .. lane_count * lane_floats], lane_count);
        var rest: []align(64) f32 = @alignCast(memory[lane_count * lane_floats ..]);
        for (batch.jobs) |*job| {
            job.lanes = &lanes;
            job.partials = rest[0..job.partial_floats()];
            rest = @alignCast(rest[job.partials.len..]);
        }
        if (lane_count > 1) {
            threads.run(@intCast(tasks), batch, run_task);
        } else for (0..tasks) |task| run_task(batch, @intCast(task));
        for (batch.jobs) |*job| job.finish();
    }

    fn run_task(context: *anyopaque, task: u32) void {
        const batch: *Batch = @ptrCast(@alignCast(context));
        const index = std.sort.upperBound(u32, batch.first_task, task, order) - 1;
        Job.run_task(&batch.jobs[index], task - batch.first_task[index]);
    }

    fn order(task: u32, first: u32) std.math.Order {
        return std.math.order(task, first);
    }
};
