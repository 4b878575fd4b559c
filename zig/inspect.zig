//! What a cache holds, in numbers, and whether it contradicts itself. Called by abi.zig; calls
//! cache.zig.
const abi = @import("abi.zig");
const cache_file = @import("cache.zig");
const message = @import("message.zig");
const Cache = cache_file.Cache;
const Row = @import("table.zig").Row;
const Tier = @import("tier.zig").Tier;

pub fn stats(cache: *Cache) abi.CacheStats {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    const sinks, const store, const warm, const tail = .{
        &cache.tiers[0],
        &cache.tiers[1],
        &cache.tiers[2],
        &cache.tiers[3],
    };
    var out: abi.CacheStats = .{
        .total_tokens = cache.len(),
        .sink_tokens = sinks.tokens(),
        .store_tokens = store.tokens(),
        .tail_tokens = tail.tokens(),
        .next_position = cache.next,
        .first_position = cache.run(1).start,
        .sink_bytes = sinks.page_count() * sinks.page_bytes(),
        .store_bytes = store.page_count() * store.page_bytes(),
        .tail_bytes = tail.page_count() * tail.page_bytes(),
        .page_count = sinks.page_count() + store.page_count() + warm.page_count() +
            tail.page_count(),
        .evicted_tokens = cache.evicted,
        .migrated_tokens = cache.migrated,
        .overhead_bytes = @sizeOf(Cache) + cache.rows.len * @sizeOf(f32),
        .warm_tokens = warm.tokens(),
        .warm_bytes = warm.page_count() * warm.page_bytes(),
    };
    const in_store = cache.body() == store;
    const tokens = if (in_store) &out.store_tokens else &out.tail_tokens;
    const bytes = if (in_store) &out.store_bytes else &out.tail_bytes;
    for (cache.kept_runs(), 0..) |*kept, i| {
        const runs = cache.kept_runs();
        const next = if (i + 1 < runs.len) &runs[i + 1] else cache.body();
        // A row that lies across two runs counts once.
        const again = if (shares_row(kept, next)) kept.heads else 0;
        const pages = kept.page_count() - again;
        tokens.* += kept.tokens();
        bytes.* += pages * kept.page_bytes();
        out.page_count += pages;
    }
    for (0..cache.run_count()) |i| out.overhead_bytes += cache.run(i).overhead_bytes();
    return out;
}

fn shares_row(tier: *const Tier, next: *const Tier) bool {
    if (tier.rows.len == 0 or next.rows.len == 0) return false;
    return tier.rows[tier.rows.len - 1] == next.rows[0];
}

/// Bytes of pages that other caches hold too.
pub fn shared_bytes(cache: *Cache) u64 {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    var sharing: Sharing = .{};
    for (0..cache.run_count()) |i| {
        const run = cache.run(i);
        const table = run.table orelse continue;
        const is_kept = i > 0 and i <= cache.kept_runs().len;
        const others = !table.alone() or
            (is_kept and cache.kept.?.references.load(.acquire) > 1);
        for (run.rows) |row| sharing.see(row, run.heads * run.page_bytes(), others);
    }
    sharing.settle();
    return sharing.bytes;
}

/// Counts the rows that others hold, of all runs in their order: a row may lie across two.
const Sharing = struct {
    bytes: u64 = 0,
    row: ?*const Row = null,
    row_bytes: u64 = 0,
    /// Tables of this cache that hold the row, and whether one of them is shared itself.
    tables: u32 = 0,
    others: bool = false,

    fn see(sharing: *Sharing, row: *const Row, row_bytes: u64, others: bool) void {
        if (row != sharing.row) {
            sharing.settle();
            sharing.row = row;
            sharing.row_bytes = row_bytes;
            sharing.tables = 0;
            sharing.others = false;
        }
        sharing.tables += 1;
        sharing.others = sharing.others or others;
    }

    fn settle(sharing: *Sharing) void {
        const row = sharing.row orelse return;
        const shared = sharing.others or row.references.load(.acquire) > sharing.tables;
        if (shared) sharing.bytes += sharing.row_bytes;
    }
};

/// Whether every invariant holds; the message names the first that does not.
pub fn check(cache: *Cache) error{Corrupt}!void {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    for (0..cache.run_count()) |i| {
        if (cache.run(i).consistent()) continue;
        message.set("the page table of run {d} does not match its positions", .{i});
        return error.Corrupt;
    }
    const sinks, const store, const warm, const tail = .{
        &cache.tiers[0],
        &cache.tiers[1],
        &cache.tiers[2],
        &cache.tiers[3],
    };
    var in_order = sinks.start == 0 and sinks.end <= store.start and
        store.end == warm.start and warm.end == tail.start and tail.end == cache.next and
        cache.cold <= cache.boundary and (cache.config.has_warm() or warm.tokens() == 0) and
        sinks.end <= cache.config.sink_tokens;
    for (cache.kept_runs(), 1..) |*kept, i| {
        in_order = in_order and cache.run(i - 1).end <= kept.start and kept.tokens() > 0 and
            kept.end <= cache.body().start;
    }
    if (!in_order or cache.len() > cache.config.max_tokens or cache.boundary > cache.next) {
        const text = "out of order: sinks to {d}, store {d} to {d}, tail {d} to {d}, next {d}";
        message.set(text, .{
            sinks.end, store.start, store.end, tail.start, tail.end, cache.next,
        });
        return error.Corrupt;
    }
}
