//! Appends, in two steps: `reserve` checks the input and gets everything that can be refused, and
//! `commit` writes; new pages, which nobody sees before, `reserve` may write. So one append, or one
//! of many caches at once, happens wholly or not at all.
//! Called by cache.zig and abi_sequence.zig; calls tier.zig and fill.zig.
const std = @import("std");
const cache_file = @import("cache.zig");
const evict = @import("evict.zig");
const fill_file = @import("fill.zig");
const format = @import("format.zig");
const gpa = @import("memory.zig").gpa;
const message = @import("message.zig");
const spill = @import("spill.zig");
const threads = @import("threads.zig");
const tier_file = @import("tier.zig");
const Cache = cache_file.Cache;
const Change = tier_file.Change;
const Input = @import("input.zig").Input;
const Kept = @import("kept.zig").Kept;
const Source = fill_file.Source;
const Tier = tier_file.Tier;
const Workspace = fill_file.Workspace;
const fill = fill_file.fill;

pub const Error = error{
    InvalidArgument,
    NotFinite,
    NotRepresentable,
    OutOfMemory,
    PoolExhausted,
    Damaged,
};

/// An append that can no longer fail. The cache is locked from `reserve` to `commit` or `cancel`.
pub const Append = struct {
    cache: *Cache,
    keys: Input,
    values: Input,
    tokens: u64,
    after: Cache.Plan,
    /// What is kept behind the window then.
    kept: ?*Kept,
    changes: [cache_file.tier_count]Change,
    workspace: Workspace,
    /// Positions that `write_ahead` has written.
    ahead: [2]u64 = .{ 0, 0 },

    pub fn reserve(cache: *Cache, keys: Input, values: Input, tokens: u64) Error!Append {
        try check_count(cache, tokens);
        const count = value_count(cache, tokens);
        const long = count >= threads.parallel_values_min;
        if (!long) try check_values(cache, keys, values, tokens);
        var after = cache.plan(tokens);
        const window = try evict.after_append(cache, tokens, after.begin);
        after.begin = window.begin;
        errdefer if (window.kept) |kept| kept.release(cache.gpa, cache.pool);
        var append: Append = .{
            .cache = cache,
            .keys = keys,
            .values = values,
            .tokens = tokens,
            .after = after,
            .kept = window.kept,
            .changes = undefined,
            .workspace = undefined,
        };
        while (true) {
            append.reserve_tiers() catch |err| {
                const moved = err == error.PoolExhausted and try spill.make_room(cache);
                if (moved) continue;
                if (long) try check_values(cache, keys, values, tokens);
                return err;
            };
            break;
        }
        errdefer append.cancel_changes(append.changes.len);
        append.workspace = try .init(cache.rows, count);
        errdefer append.workspace.deinit();
        if (long) try append.write_ahead();
        return append;
    }

    /// Checks a long input. What of it goes straight into new pages, which nobody sees before
    /// `commit`, is checked while it is packed into them, so that it is read once.
    fn write_ahead(append: *Append) Error!void {
        const cache = append.cache;
        const name = cache.body_name();
        var new: ?Tier = null;
        if (!cache.config.has_warm()) {
            new = append.changes[@backingInt(name)].filled(cache.tier_of(name));
        }
        var unchecked = append.source();
        unchecked.limits = .{ cache.key_limit, cache.value_limit };
        const rows = if (new) |*rows| rows else null;
        if (fill_file.fill_and_check(rows, &unchecked, append.tokens, &append.workspace)) {
            if (new) |written| append.ahead = .{ written.start, written.end };
            return;
        }
        try check_values(cache, append.keys, append.values, append.tokens); // says what is wrong
        message.set("the input changed while it was read", .{});
        return error.InvalidArgument;
    }

    fn reserve_tiers(append: *Append) Error!void {
        const cache = append.cache;
        var reserved: usize = 0;
        errdefer append.cancel_changes(reserved);
        const moved = cache.bounds(append.after);
        for (&cache.tiers, moved, &append.changes) |*tier, bound, *change| {
            const written = @max(tier.end, bound[0]);
            change.* = try tier.reserve(cache.gpa, cache.pool, bound[0], bound[1], written);
            reserved += 1;
        }
    }

    pub fn cancel(append: *Append) void {
        append.cancel_changes(append.changes.len);
        append.workspace.deinit();
        if (append.kept) |kept| kept.release(append.cache.gpa, append.cache.pool);
    }

    fn cancel_changes(append: *Append, count: usize) void {
        const cache = append.cache;
        for (cache.tiers[0..count], append.changes[0..count]) |*tier, *change| {
            tier.cancel(cache.gpa, cache.pool, change);
        }
    }

    /// Where its rows come from, as long as no tier has moved.
    fn source(append: *const Append) Source {
        const cache = append.cache;
        const held = cache.tier_of(.store);
        const runs = cache.kept_runs();
        const through = cache.config.has_warm();
        const left = if (through) cache.cold else cache.boundary;
        return .{
            .keys = append.keys,
            .values = append.values,
            .first = cache.next,
            .tail = cache.tier_of(.tail),
            .migrating_from = @max(left, cache.config.sink_tokens),
            .batch = if (through) format.page_tokens else cache.config.migration_batch,
            .kept = if (runs.len == 0) null else &runs[runs.len - 1],
            .new_page = if (held.tokens() == 0) 0 else (held.end - 1) / held.tokens_per_page + 1,
        };
    }

    pub fn commit(append: *Append) void {
        const cache = append.cache;
        const live_before = cache.len();
        const through = cache.config.has_warm();
        const from = append.source();
        const sinks = cache.tier_of(.sinks);
        const sinks_before = sinks.end;
        append.move(.sinks);
        append.write(sinks, sinks_before, &from, null);

        const store = cache.tier_of(.store);
        const stored_before = store.end;
        const warm = cache.tier_of(.warm);
        const warm_before = warm.end;
        append.move(.store);
        // Warm tier and tail still hold what they held: what migrates is read from there.
        append.write(store, stored_before, &from, if (through) warm else null);
        append.move(.warm);
        append.write(warm, warm_before, &from, null);

        const tail = cache.tier_of(.tail);
        append.move(.tail);
        append.write(tail, cache.next, &from, null);
        append.workspace.deinit();
        cache.replace_kept(append.kept);

        cache.migrated += warm.end - @min(warm.end, @max(warm_before, sinks.end));
        cache.evicted += live_before + append.tokens - cache.len();
        cache.next = append.after.next;
        cache.begin = append.after.begin;
        cache.boundary = append.after.boundary;
        cache.cold = append.after.cold;
    }

    /// Writes the tokens of a tier that were not there before, from position `first` on. What was
    /// written ahead is the body's, and in no other tier.
    fn write(
        append: *Append,
        tier: *Tier,
        first: u64,
        from: *const Source,
        through: ?*const Tier,
    ) void {
        const start = @max(first, tier.start);
        const before = @min(append.ahead[0], tier.end);
        const after = @max(append.ahead[1], start);
        const workspace = &append.workspace;
        if (start < before) fill(tier, start, before, from, through, workspace);
        if (after < tier.end) fill(tier, after, tier.end, from, through, workspace);
    }

    fn move(append: *Append, name: cache_file.TierName) void {
        const cache = append.cache;
        cache.tier_of(name).commit(cache.gpa, cache.pool, &append.changes[@backingInt(name)]);
    }
};

fn check_count(cache: *const Cache, tokens: u64) Error!void {
    if (tokens > std.math.maxInt(u48) - cache.next) {
        message.set("tokens: {d} more would pass the highest position, 2^48", .{tokens});
        return error.InvalidArgument;
    }
    if (tokens > std.math.maxInt(usize)) return error.OutOfMemory;
    if (cache.mapping) |mapping| try mapping.verify(); // pages of it may be copied
}

fn check_values(cache: *const Cache, keys: Input, values: Input, tokens: u64) Error!void {
    const heads = cache.config.num_kv_heads;
    try keys.validate(tokens, heads, cache.key_limit);
    try values.validate(tokens, heads, cache.value_limit);
}

/// Numbers that the tokens bring.
fn value_count(cache: *const Cache, tokens: u64) u64 {
    const config = &cache.config;
    return tokens *| config.num_kv_heads *| (config.head_dim + config.value_dim);
}

/// An append of more tokens than leave room for what is kept behind the window: piece by piece,
/// and all back where it was if one of them fails. The cache is locked.
pub fn in_pieces(cache: *Cache, keys: Input, values: Input, tokens: u64) Error!void {
    try check_count(cache, tokens);
    try check_values(cache, keys, values, tokens);
    var saved: Cache = undefined;
    saved.gpa = cache.gpa;
    saved.pool = cache.pool;
    saved.share_from(cache);
    const piece_max = evict.append_tokens_max(cache);
    var done: u64 = 0;
    while (done < tokens) {
        const piece = @min(piece_max, tokens - done);
        var append = Append.reserve(cache, keys.from(done), values.from(done), piece) catch |err| {
            cache.drop_contents();
            cache.take_from(&saved);
            return err;
        };
        append.commit();
        done += piece;
    }
    saved.drop_contents();
}

pub const Item = struct { cache: *Cache, keys: Input, values: Input, tokens: u64 };

/// Appends to every cache, or to none; `failed` tells which one is to blame.
pub fn append_many(items: []const Item, failed: *usize) Error!void {
    const caches = try gpa.alloc(*Cache, items.len);
    defer gpa.free(caches);
    for (caches, items) |*cache, item| cache.* = item.cache;
    std.mem.sort(*Cache, caches, {}, Cache.before);
    for (items, 0..) |item, i| {
        const at = std.sort.lowerBound(*Cache, caches, item.cache, order);
        if (at + 1 == caches.len or caches[at + 1] != item.cache) continue;
        failed.* = i;
        message.set("the same cache was given twice", .{});
        return error.InvalidArgument;
    }
    for (caches) |cache| cache.lock.lock();
    defer for (caches) |cache| cache.lock.unlock();

    for (items) |item| {
        if (item.tokens > evict.append_tokens_max(item.cache)) return many_in_pieces(items, failed);
    }
    const appends = try gpa.alloc(Append, items.len);
    defer gpa.free(appends);
    for (items, appends, 0..) |item, *append, i| {
        append.* = Append.reserve(item.cache, item.keys, item.values, item.tokens) catch |err| {
            failed.* = i;
            for (appends[0..i]) |*done| done.cancel();
            return err;
        };
    }
    commit_all(appends);
}

/// One after the other, and all back where they were if one of them fails.
fn many_in_pieces(items: []const Item, failed: *usize) Error!void {
    const saved = try gpa.alloc(Cache, items.len);
    defer gpa.free(saved);
    for (saved, items) |*state, item| {
        state.gpa = item.cache.gpa;
        state.pool = item.cache.pool;
        state.share_from(item.cache);
    }
    for (items, 0..) |item, i| {
        in_pieces(item.cache, item.keys, item.values, item.tokens) catch |err| {
            failed.* = i;
            for (items, saved) |other, *state| {
                other.cache.drop_contents();
                other.cache.take_from(state);
            }
            return err;
        };
    }
    for (saved) |*state| state.drop_contents();
}

fn order(cache: *Cache, other: *Cache) std.math.Order {
    return std.math.order(@intFromPtr(cache), @intFromPtr(other));
}

/// Long appends share out their heads, one after the other; short ones are a task each.
fn commit_all(appends: []Append) void {
    var values: u64 = 0;
    for (appends) |*append| {
        if (!append.workspace.borrowed) values += value_count(append.cache, append.tokens);
    }
    if (values >= threads.parallel_values_min) {
        threads.run(@intCast(appends.len), appends.ptr, commit_short);
    } else for (0..appends.len) |i| commit_short(appends.ptr, @intCast(i));
    for (appends) |*append| {
        if (append.workspace.borrowed) append.commit();
    }
}

fn commit_short(context: *anyopaque, index: u32) void {
    const appends: [*]Append = @ptrCast(@alignCast(context));
    if (!appends[index].workspace.borrowed) appends[index].commit();
}
