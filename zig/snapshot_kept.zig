//! What snapshot.zig does, for tokens that are kept behind the window (kept.zig). They lie in rows
//! of the body, of which several runs may hold tokens; a row leaves with all of them, and comes
//! back to all of them. Called by snapshot.zig.
const std = @import("std");
const abi = @import("abi.zig");
const cache_file = @import("cache.zig");
const kept_file = @import("kept.zig");
const message = @import("message.zig");
const recode = @import("recode.zig");
const snapshot = @import("snapshot.zig");
const tier_file = @import("tier.zig");
const Cache = cache_file.Cache;
const Kept = kept_file.Kept;
const Mapping = @import("mapping.zig").Mapping;
const Piece = tier_file.Piece;
const Range = kept_file.Range;
const Tier = tier_file.Tier;

/// Its number beside those of the tiers.
pub const tier_name = 4;

pub fn row_count(body: *const Tier, runs: []const Tier) u64 {
    var rows: u64 = 0;
    var next: u64 = 0;
    for (runs) |*run| {
        const end = (run.end - 1) / body.tokens_per_page + 1;
        rows += end - @max(next, run.start / body.tokens_per_page);
        next = end;
    }
    return rows;
}

pub fn state(cache: *const Cache) abi.TierState {
    const body = cache.body();
    const runs = cache.kept_runs();
    var out: abi.TierState = .{
        .rows = row_count(body, runs),
        .heads = body.heads,
        .page_bytes = body.page_bytes(),
    };
    if (runs.len == 0) return out;
    out.start = runs[0].start;
    out.end = runs[runs.len - 1].end;
    out.first_row = out.start / body.tokens_per_page;
    return out;
}

/// The runs that hold tokens of row `number`.
fn runs_of(cache: *const Cache, number: u64) error{InvalidArgument}![]const Tier {
    const start = number *| cache.body().tokens_per_page;
    const end = start +| cache.body().tokens_per_page;
    const runs = cache.kept_runs();
    var first: usize = 0;
    while (first < runs.len and runs[first].end <= start) first += 1;
    var last = first;
    while (last < runs.len and runs[last].start < end) last += 1;
    if (first < last) return runs[first..last];
    message.set("nothing is kept in row {d}", .{number});
    return error.InvalidArgument;
}

/// As snapshot.read; the cache is locked.
pub fn read(
    cache: *Cache,
    first: u64,
    count: u64,
    pages: ?[*]u8,
    hashes: ?[*]u64,
) error{ InvalidArgument, OutOfMemory }!void {
    const body = cache.body();
    const bytes = body.page_bytes();
    for (0..@intCast(@min(count, std.math.maxInt(u32)))) |row| _ = try runs_of(cache, first +| row);
    const scratch = try cache.gpa.alloc(u8, bytes);
    defer cache.gpa.free(scratch);
    for (0..@intCast(count)) |row| for (0..body.heads) |head| {
        const number = first +| row;
        const place = row * body.heads + head;
        const page = if (pages) |all| all[place * bytes ..][0..bytes] else scratch;
        @memset(page, 0);
        for (try runs_of(cache, number)) |*run| copy_live(run, number, head, page);
        if (hashes) |all| all[place] = snapshot.hash(page);
    };
}

/// Copies the tokens that a run has in a page.
fn copy_live(run: *const Tier, number: u64, head: usize, target: []u8) void {
    const first = number * run.tokens_per_page;
    const start: usize = @intCast(@max(run.start, first) - first);
    const end: usize = @intCast(@min(run.end, first + run.tokens_per_page) - first);
    const page = run.page_at(number, head);
    const key_bytes = run.key.bytes();
    if (run.key.centred) { // the same in all runs of a page: see fill.zig
        const at = run.key.code_bytes() + run.key.scale_bytes();
        const offsets = run.key.offsets(run.keys_of(page));
        @memcpy(target[at..][0..run.key.dim_stored()], offsets[0..run.key.dim_stored()]);
    }
    for (start..end) |slot| {
        recode.copy(run.key, .key, run.keys_of(page), target[0..key_bytes], slot);
        recode.copy(run.value, .value, run.values_of(page), target[key_bytes..], slot);
    }
}

/// As snapshot.write; the cache is locked, and nobody shares it yet.
pub fn write(
    cache: *Cache,
    first: u64,
    count: u64,
    pages: [*]const u8,
    hashes: ?[*]u64,
) error{InvalidArgument}!void {
    const body = cache.body();
    const bytes = body.page_bytes();
    for (0..@intCast(@min(count, std.math.maxInt(u32)))) |i| {
        const number = first +| i;
        const run = &(try runs_of(cache, number))[0];
        const row = run.rows[@intCast(number - run.first_page)];
        if (row.mapping != null or cache.kept.?.references.load(.acquire) > 1) {
            message.set("a row that is shared, or in a file, cannot be overwritten", .{});
            return error.InvalidArgument;
        }
        for (0..body.heads) |head| {
            const place = i * body.heads + head;
            const page = row.pages()[head][0..bytes];
            @memcpy(page, pages[place * bytes ..][0..bytes]);
            if (hashes) |all| all[place] = snapshot.hash(page);
        }
    }
}

/// Refuses ranges that cannot be what is kept behind a window of these bounds, or that need another
/// number of rows. Returns their tokens.
pub fn check(
    cache: *const Cache,
    bounds: [cache_file.tier_count][2]u64,
    ranges: []const Range,
    rows: u64,
) error{InvalidArgument}!u64 {
    const body_start = bounds[@backingInt(cache.body_name())][0];
    const size = cache.body().tokens_per_page;
    var end = bounds[0][1];
    var tokens: u64 = 0;
    var needed: u64 = 0;
    var next_row: u64 = 0;
    for (ranges) |range| {
        if (range.start < end or range.end <= range.start or range.end > body_start) {
            message.set("positions {d} to {d} cannot be kept behind a window from {d} on", .{
                range.start, range.end, body_start,
            });
            return error.InvalidArgument;
        }
        end = range.end;
        tokens += range.end - range.start;
        const end_row = (end - 1) / size + 1;
        needed += end_row - @max(next_row, range.start / size);
        next_row = end_row;
    }
    if (needed == rows) return tokens;
    message.set("{d} rows given for positions that need {d}", .{ rows, needed });
    return error.InvalidArgument;
}

/// Makes what is kept, in new rows or in those of a mapping.
pub fn open(
    cache: *Cache,
    pins: []const Range,
    ranges: []const Range,
    mapping: ?*Mapping,
    pieces: []const abi.MappedRows,
) error{ InvalidArgument, OutOfMemory, PoolExhausted }!?*Kept {
    const gpa = cache.gpa;
    const body = cache.body();
    var sources: std.ArrayList(Tier) = .empty;
    defer {
        for (sources.items) |*source| source.deinit(gpa, cache.pool);
        sources.deinit(gpa);
    }
    var list: std.ArrayList(Piece) = .empty;
    defer list.deinit(gpa);
    var at: usize = 0;
    var first: usize = 0;
    while (first < ranges.len) {
        // Ranges whose rows follow one another are one source.
        var last = first;
        while (last + 1 < ranges.len and ranges[last + 1].start / body.tokens_per_page <=
            (ranges[last].end - 1) / body.tokens_per_page + 1) last += 1;
        const end_row = (ranges[last].end - 1) / body.tokens_per_page + 1;
        list.clearRetainingCapacity();
        while (at < pieces.len and pieces[at].first < end_row) : (at += 1) {
            const piece = &pieces[at];
            try list.append(gpa, .{
                .first = piece.first,
                .count = piece.count,
                .region = piece.region,
                .offset = piece.offset,
            });
        }
        var source = body.*; // its shape; the cache is empty
        const start = ranges[first].start;
        try source.open(gpa, cache.pool, start, ranges[last].end, mapping, list.items);
        errdefer source.deinit(gpa, cache.pool);
        try sources.append(gpa, source);
        first = last + 1;
    }
    if (at < pieces.len) return error.InvalidArgument;
    const pointers = try gpa.alloc(*const Tier, sources.items.len);
    defer gpa.free(pointers);
    for (pointers, sources.items) |*pointer, *source| pointer.* = source;
    return Kept.create(gpa, cache.pool, pins, ranges, pointers);
}
