//! Files mapped into memory, whose bytes serve as pages of caches: read where they are, copied by
//! whoever wants to write. What has to match a hash is checked once, before its first use.
//!
//! A mapping is counted by reference: every row in it holds it, and so does every cache that was
//! loaded from it. Called by abi_snapshot.zig, snapshot.zig and table.zig; calls the system.
const std = @import("std");
const builtin = @import("builtin");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const message = @import("message.zig");
const spill_file = @import("spill.zig");
const sync = @import("sync.zig");
const threads = @import("threads.zig");

const Spill = spill_file.Spill;

/// Whether files can be mapped here at all.
pub const offered = !builtin.cpu.arch.isWasm();

const Region = []align(std.heap.page_size_min) u8;

/// Pages that follow one another in a region, and what they hash to.
const Check = struct { region: usize, offset: usize, page_bytes: usize, hashes: []const u64 };

pub const Mapping = struct {
    gpa: Allocator,
    references: std.atomic.Value(u32) = .init(1),
    regions: std.ArrayList(Region) = .empty,
    checks: std.ArrayList(Check) = .empty,
    verdict: std.atomic.Value(Verdict) = .init(.unknown),
    /// A part of a spill that this is, instead of files.
    spilled: ?struct { spill: *Spill, extent: spill_file.Extent } = null,
    /// Held by the one who finds out.
    mutex: sync.Mutex = .{},

    const Verdict = enum(u8) { unknown, intact, damaged };

    pub fn create(gpa: Allocator) error{OutOfMemory}!*Mapping {
        const mapping = try gpa.create(Mapping);
        mapping.* = .{ .gpa = gpa };
        return mapping;
    }

    pub fn retain(mapping: *Mapping) *Mapping {
        const before = mapping.references.fetchAdd(1, .monotonic);
        assert(before > 0);
        return mapping;
    }

    pub fn release(mapping: *Mapping) void {
        const before = mapping.references.fetchSub(1, .acq_rel);
        assert(before > 0);
        if (before > 1) return;
        const gpa = mapping.gpa;
        if (mapping.spilled) |part| part.spill.give_back(part.extent);
        for (mapping.regions.items) |region| system.unmap(region);
        mapping.regions.deinit(gpa);
        for (mapping.checks.items) |check| gpa.free(check.hashes);
        mapping.checks.deinit(gpa);
        gpa.destroy(mapping);
    }

    /// Maps the first `bytes` of an open file, which may be closed afterwards. The file must stay
    /// as it is. Returns the number of the region.
    pub fn add_file(mapping: *Mapping, file: i64, bytes: u64) Error!u64 {
        if (!offered) {
            message.set("files cannot be mapped into this core", .{});
            return error.InvalidArgument;
        }
        const len = std.math.cast(usize, bytes) orelse return error.OutOfMemory;
        if (len == 0) return error.InvalidArgument;
        try mapping.regions.ensureUnusedCapacity(mapping.gpa, 1);
        mapping.regions.appendAssumeCapacity(try system.map(file, len));
        return mapping.regions.items.len - 1;
    }

    /// Says what `count` pages must hash to.
    pub fn expect(
        mapping: *Mapping,
        region: u64,
        offset: u64,
        page_bytes: u64,
        hashes: []const u64,
    ) Error!void {
        const bytes = std.math.mul(u64, page_bytes, hashes.len) catch
            return error.InvalidArgument;
        _ = try mapping.slice(region, offset, bytes);
        const copy = try mapping.gpa.dupe(u64, hashes);
        errdefer mapping.gpa.free(copy);
        try mapping.checks.append(mapping.gpa, .{
            .region = @intCast(region),
            .offset = @intCast(offset),
            .page_bytes = @intCast(page_bytes),
            .hashes = copy,
        });
    }

    /// Bytes of a region, on a multiple of 64.
    pub fn slice(
        mapping: *const Mapping,
        region: u64,
        offset: u64,
        bytes: u64,
    ) error{InvalidArgument}![]align(64) u8 {
        if (region < mapping.regions.items.len) {
            const whole = mapping.regions.items[@intCast(region)];
            if (offset % 64 == 0 and offset <= whole.len and bytes <= whole.len - offset) {
                return @alignCast(whole[@intCast(offset)..][0..@intCast(bytes)]);
            }
        }
        message.set("bytes [{d}, {d}) of region {d}: not in the mapping, or not aligned", .{
            offset, offset +| bytes, region,
        });
        return error.InvalidArgument;
    }

    /// Checks all hashes, unless that was done.
    pub fn verify(mapping: *Mapping) error{Damaged}!void {
        if (mapping.verdict.load(.acquire) == .unknown) {
            mapping.mutex.lock();
            defer mapping.mutex.unlock();
            if (mapping.verdict.load(.acquire) == .unknown) mapping.find_out();
        }
        if (mapping.verdict.load(.acquire) == .intact) return;
        message.set("the file that this cache is mapped from is damaged", .{});
        return error.Damaged;
    }

    fn find_out(mapping: *Mapping) void {
        for (mapping.regions.items) |region| system.read_ahead(region);
        var search: Search = .{ .mapping = mapping, .check = undefined };
        for (mapping.checks.items) |*check| {
            search.check = check;
            const pages = check.hashes.len;
            const tasks: u32 = @intCast((pages + search.per_task() - 1) / search.per_task());
            threads.run(tasks, &search, Search.run_task);
        }
        mapping.verdict.store(
            if (search.damaged.load(.acquire)) .damaged else .intact,
            .release,
        );
    }
};

pub const Error = error{ InvalidArgument, OutOfMemory };

const Search = struct {
    mapping: *const Mapping,
    check: *const Check,
    damaged: std.atomic.Value(bool) = .init(false),

    const task_bytes = 512 << 10;

    fn per_task(search: *const Search) usize {
        return @max(1, task_bytes / search.check.page_bytes);
    }

    fn run_task(context: *anyopaque, task: u32) void {
        const search: *Search = @ptrCast(@alignCast(context));
        const check = search.check;
        const first = task * search.per_task();
        const region = search.mapping.regions.items[check.region];
        for (first..@min(first + search.per_task(), check.hashes.len)) |i| {
            const page = region[check.offset + i * check.page_bytes ..][0..check.page_bytes];
            if (std.hash.XxHash64.hash(0, page) != check.hashes[i]) {
                search.damaged.store(true, .release);
            }
        }
    }
};

/// Private, so that not even a mistake can write to the file.
const system = switch (builtin.os.tag) {
    .windows => struct {
        const HANDLE = std.os.windows.HANDLE;
        extern "kernel32" fn CreateFileMappingW(
            file: HANDLE,
            attributes: ?*anyopaque,
            protect: u32,
            size_high: u32,
            size_low: u32,
            name: ?[*:0]const u16,
        ) callconv(.winapi) ?HANDLE;
        extern "kernel32" fn MapViewOfFile(
            mapping: HANDLE,
            access: u32,
            offset_high: u32,
            offset_low: u32,
            bytes: usize,
        ) callconv(.winapi) ?*anyopaque;
        extern "kernel32" fn UnmapViewOfFile(base: *const anyopaque) callconv(.winapi) i32;
        extern "kernel32" fn CloseHandle(handle: HANDLE) callconv(.winapi) i32;
        const page_writecopy = 0x08;
        const file_map_copy = 0x01;

        fn map(file: i64, bytes: usize) Error!Region {
            const handle: HANDLE = @ptrFromInt(@as(usize, @bitCast(@as(isize, @intCast(file)))));
            const section = CreateFileMappingW(handle, null, page_writecopy, 0, 0, null) orelse
                return error.OutOfMemory;
            defer _ = CloseHandle(section);
            const base = MapViewOfFile(section, file_map_copy, 0, 0, bytes) orelse
                return error.OutOfMemory;
            const pointer: [*]align(std.heap.page_size_min) u8 = @ptrCast(@alignCast(base));
            return pointer[0..bytes];
        }

        fn unmap(region: Region) void {
            _ = UnmapViewOfFile(region.ptr);
        }

        fn read_ahead(_: Region) void {}
    },
    .freestanding => struct {
        fn map(_: i64, _: usize) Error!Region {
            unreachable; // add_file
        }
        fn unmap(_: Region) void {}
        fn read_ahead(_: Region) void {}
    },
    else => struct {
        const posix = std.posix;

        fn map(file: i64, bytes: usize) Error!Region {
            const fd = std.math.cast(posix.fd_t, file) orelse return error.InvalidArgument;
            return posix.mmap(
                null,
                bytes,
                .{ .READ = true, .WRITE = true },
                .{ .TYPE = .PRIVATE },
                fd,
                0,
            ) catch return error.OutOfMemory;
        }

        fn unmap(region: Region) void {
            posix.munmap(region);
        }

        fn read_ahead(region: Region) void {
            posix.madvise(region.ptr, region.len, posix.MADV.WILLNEED) catch {};
        }
    },
};

test "a mapping that nothing was added to is intact" {
    const mapping = try Mapping.create(std.testing.allocator);
    defer mapping.release();
    try mapping.verify();
    _ = mapping.retain();
    mapping.release();
    try std.testing.expectError(error.InvalidArgument, mapping.slice(0, 0, 1));
}
