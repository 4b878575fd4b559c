//! What this machine can do at most: read bandwidth of memory, and multiplications.
//! Prints one JSON object per line. Called by limits.py, which compiles it for the CPU it runs on:
//!
//!     limits THREADS MEBIBYTES REPEATS
//!
//! A bandwidth is the median over the repeats of the best of several ways to read (streams that
//! advance together, distance of the prefetch), because no single way is the best on every CPU.

const std = @import("std");
const builtin = @import("builtin");

const lanes = std.simd.suggestVectorLength(f32) orelse 4;
const Floats = @Vector(lanes, f32);
const Line = @Vector(8, u64);
const line_bytes = 64;
const threads_max = 256;
const repeats_max = 64;

pub fn main(init: std.process.Init.Minimal) !void {
    const argv = init.args.vector;
    if (argv.len != 4) return error.ExpectedThreadsMebibytesRepeats;
    const threads = try number(argv[1]);
    const bytes = try number(argv[2]) << 20;
    const repeats = @min(try number(argv[3]), repeats_max);
    if (threads == 0 or threads > threads_max or repeats == 0) return error.OutOfRange;
    try read_all(threads, bytes, repeats);
    try report_compute("f32_multiply_add", fused, fused_operations, threads, repeats);
    if (has_int8_dot) try report_compute("int8_dot", dot, dot_operations, threads, repeats);
}

fn number(text: [*:0]const u8) !usize {
    return std.fmt.parseInt(usize, std.mem.span(text), 10);
}

// Reading.

const Way = struct { streams: usize, prefetch_bytes: usize };
const ways = [_]Way{
    .{ .streams = 1, .prefetch_bytes = 0 },
    .{ .streams = 1, .prefetch_bytes = 1024 },
    .{ .streams = 1, .prefetch_bytes = 4096 },
    .{ .streams = 4, .prefetch_bytes = 1024 },
    .{ .streams = 8, .prefetch_bytes = 0 },
    .{ .streams = 8, .prefetch_bytes = 1024 },
};

fn read_all(threads: usize, bytes: usize, repeats: usize) !void {
    const memory = try std.heap.page_allocator.alignedAlloc(u8, .fromByteUnits(1 << 16), bytes);
    defer std.heap.page_allocator.free(memory);
    if (builtin.os.tag == .linux) _ = std.os.linux.madvise(memory.ptr, memory.len, advice_huge);
    @memset(memory, 1);

    const share = bytes / threads & ~@as(usize, 0xffff);
    for (ways) |way| {
        var seconds: [repeats_max]f64 = undefined;
        for (seconds[0..repeats]) |*one| {
            var jobs: [threads_max]Job = undefined;
            for (jobs[0..threads], 0..) |*job, i| {
                job.* = .{ .memory = memory[i * share ..][0..share], .way = way };
            }
            one.* = try together(jobs[0..threads]);
        }
        const median_seconds = median(seconds[0..repeats]);
        const rate = @as(f64, @floatFromInt(share * threads)) / median_seconds / 1e9;
        _ = std.c.printf(
            "{\"what\": \"read\", \"threads\": %zu, \"streams\": %zu, \"prefetch\": %zu, " ++
                "\"per_second\": %.3f}\n",
            threads,
            way.streams,
            way.prefetch_bytes,
            rate,
        );
    }
}

/// Streams that lie one after the other advance together, 256 bytes a turn.
fn read(memory: []const u8, way: Way) u64 {
    var sums: [4]Line = @splat(@splat(0));
    const stream_bytes = memory.len / way.streams & ~@as(usize, 255);
    var offset: usize = 0;
    while (offset < stream_bytes) : (offset += 256) {
        for (0..way.streams) |stream| {
            const at = memory.ptr + stream * stream_bytes + offset;
            inline for (0..4) |i| {
                const place = at + i * line_bytes;
                if (way.prefetch_bytes > 0) @prefetch(place + way.prefetch_bytes, .{});
                const line: *const Line = @ptrCast(@alignCast(place));
                sums[i] +%= line.*;
            }
        }
    }
    return @reduce(.Add, sums[0] +% sums[1] +% sums[2] +% sums[3]);
}

// Multiplying. Enough independent sums to hide the latency, few enough to stay in registers.

const turns = 4_000_000;
const sums_count = 12;
const fused_operations = turns * sums_count * lanes * 2;

fn fused(seed: u64) u64 {
    const factor: Floats = @splat(0.999 + 1e-9 * @as(f32, @floatFromInt(seed)));
    const addend: Floats = @splat(0.001);
    var sums: [sums_count]Floats = undefined;
    inline for (&sums, 0..) |*sum, i| sum.* = @splat(@floatFromInt(i));
    for (0..turns) |_| {
        inline for (&sums) |*sum| sum.* = @mulAdd(Floats, sum.*, factor, addend);
    }
    var total: Floats = @splat(0);
    inline for (sums) |sum| total += sum;
    return @intFromFloat(@abs(@reduce(.Add, total)));
}

const Words = @Vector(16, i32);
const has_int8_dot = builtin.cpu.arch == .x86_64 and builtin.cpu.has(.x86, .avx512vnni);
const dot_operations = turns * sums_count * 64 * 2;

const llvm = struct {
    extern fn @"llvm.x86.avx512.vpdpbusd.512"(Words, Words, Words) Words;
};

fn dot(seed: u64) u64 {
    const left: Words = @splat(@intCast(0x01020304 + (seed & 1)));
    const right: Words = @splat(0x04030201);
    var sums: [sums_count]Words = undefined;
    inline for (&sums, 0..) |*sum, i| sum.* = @splat(i);
    for (0..turns) |_| {
        inline for (&sums) |*sum| {
            sum.* = llvm.@"llvm.x86.avx512.vpdpbusd.512"(sum.*, left, right);
        }
    }
    var total: Words = @splat(0);
    inline for (sums) |sum| total +%= sum;
    return @as(u32, @bitCast(@reduce(.Add, total)));
}

fn report_compute(
    what: [*:0]const u8,
    comptime kernel: fn (u64) u64,
    operations: u64,
    threads: usize,
    repeats: usize,
) !void {
    var seconds: [repeats_max]f64 = undefined;
    for (seconds[0..repeats]) |*one| {
        var jobs: [threads_max]Job = undefined;
        for (jobs[0..threads]) |*job| job.* = .{ .kernel = kernel };
        one.* = try together(jobs[0..threads]);
    }
    const total: f64 = @floatFromInt(operations * threads);
    _ = std.c.printf(
        "{\"what\": \"%s\", \"threads\": %zu, \"per_second\": %.3f}\n",
        what,
        threads,
        total / median(seconds[0..repeats]) / 1e9,
    );
}

// Running.

const Job = struct {
    memory: []const u8 = &.{},
    way: Way = ways[0],
    kernel: ?*const fn (u64) u64 = null,

    fn run(job: *const Job, waiting: *std.atomic.Value(usize), seconds: *f64) void {
        _ = waiting.fetchSub(1, .acq_rel);
        while (waiting.load(.acquire) > 0) std.atomic.spinLoopHint();
        const start = now();
        const result = if (job.kernel) |kernel| kernel(waiting.load(.monotonic)) else //
            read(job.memory, job.way);
        std.mem.doNotOptimizeAway(result);
        seconds.* = now() - start;
    }
};

/// Seconds of the slowest of all jobs, started at once.
fn together(jobs: []const Job) !f64 {
    var waiting: std.atomic.Value(usize) = .init(jobs.len);
    var seconds: [threads_max]f64 = undefined;
    var threads: [threads_max]std.Thread = undefined;
    for (jobs, 0..) |*job, i| {
        threads[i] = try std.Thread.spawn(.{}, Job.run, .{ job, &waiting, &seconds[i] });
    }
    for (threads[0..jobs.len]) |thread| thread.join();
    return std.mem.max(f64, seconds[0..jobs.len]);
}

fn now() f64 {
    var time: std.c.timespec = undefined;
    _ = std.c.clock_gettime(.MONOTONIC, &time);
    return @as(f64, @floatFromInt(time.sec)) + 1e-9 * @as(f64, @floatFromInt(time.nsec));
}

fn median(values: []f64) f64 {
    std.mem.sort(f64, values, {}, std.sort.asc(f64));
    return values[values.len / 2];
}

const advice_huge = 14; // MADV_HUGEPAGE
