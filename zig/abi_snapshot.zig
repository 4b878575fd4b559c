//! The part of the C ABI that takes the state of a cache apart and puts it together again; abi.zig
//! exports it. Tiers are 0 sinks, 1 store, 2 warm, 3 tail, 4 what is kept behind the window. A row
//! is the pages of all kv heads that cover the same positions: (head, page_bytes).
const Cache = @import("cache.zig").Cache;
const Status = @import("abi.zig").Status;
const gpa = @import("memory.zig").gpa;
const Range = @import("kept.zig").Range;
const mapping_file = @import("mapping.zig");
const message = @import("message.zig");
const Pool = @import("pool.zig").Pool;
const spill_file = @import("spill.zig");
const Spill = spill_file.Spill;
const snapshot = @import("snapshot.zig");
const status_file = @import("status.zig");
const adopt = status_file.adopt;
const fail = status_file.fail;
const hand_out = status_file.hand_out;

/// With the pages, the whole state of a cache.
pub const CacheState = extern struct {
    size_bytes: u32 = @sizeOf(CacheState),
    reserved: u32 = 0,
    /// Position of the token that will be appended next.
    next: u64 = 0,
    /// First position that eviction has not taken, sinks aside.
    begin: u64 = 0,
    /// Positions below this are in the store.
    cold: u64 = 0,
    /// Positions below this have left the tail: what is not in the store is warm.
    boundary: u64 = 0,
    evicted: u64 = 0,
    migrated: u64 = 0,
    /// Rows of the tiers. They follow from the above: `cache_set_state` refuses others, so that no
    /// caller gets more pages than it has bytes for.
    sink_rows: u64 = 0,
    store_rows: u64 = 0,
    warm_rows: u64 = 0,
    tail_rows: u64 = 0,
    kept_rows: u64 = 0,
};

/// What one tier holds; it follows from `CacheState` and the configuration.
pub const TierState = extern struct {
    size_bytes: u32 = @sizeOf(TierState),
    reserved: u32 = 0,
    /// Positions [start, end).
    start: u64 = 0,
    end: u64 = 0,
    /// Row n begins at position n times the tokens of a page.
    first_row: u64 = 0,
    rows: u64 = 0,
    heads: u64 = 0,
    page_bytes: u64 = 0,
};

pub const Mapping = mapping_file.Mapping;

/// Rows [first, first + count) of a tier, one after the other in a file of a mapping.
pub const MappedRows = extern struct {
    size_bytes: u32 = @sizeOf(MappedRows),
    tier: u32 = 0,
    first: u64 = 0,
    count: u64 = 0,
    region: u64 = 0,
    offset: u64 = 0,
};

pub fn cache_state(cache: *Cache, out: *CacheState) callconv(.c) Status {
    return hand_out(CacheState, out, snapshot.state(cache));
}

pub fn cache_tier(cache: *Cache, tier: u32, out: *TierState) callconv(.c) Status {
    const value = snapshot.tier(cache, tier) catch |err| return fail(err);
    return hand_out(TierState, out, value);
}

/// Copies rows [first, first + count) of a tier, slots without a live token as zeros, and hashes
/// each page: (row, head) XXH64 with seed 0. Either output may be null.
pub fn cache_read_rows(
    cache: *Cache,
    tier: u32,
    first: u64,
    count: u64,
    pages: ?[*]u8,
    hashes: ?[*]u64,
) callconv(.c) Status {
    snapshot.read(cache, tier, first, count, pages, hashes) catch |err| return fail(err);
    return .ok;
}

/// Makes an empty cache hold the positions of `state`, and the ranges of positions that were kept
/// behind the window, in order; pins come back by `cache_pin`. Rows that `pieces` names (sorted by
/// tier and row) are those of the mapping; all others are zeros until `cache_write_rows` has filled
/// them.
pub fn cache_set_state(
    cache: *Cache,
    state: *const CacheState,
    kept: ?[*]const Range,
    kept_len: u64,
    mapping: ?*Mapping,
    pieces: ?[*]const MappedRows,
    pieces_len: u64,
) callconv(.c) Status {
    const given = adopt(CacheState, state) catch |err| return fail(err);
    const ranges = if (kept) |all| all[0..@intCast(kept_len)] else &[_]Range{};
    const list = if (pieces) |all| all[0..@intCast(pieces_len)] else &[_]MappedRows{};
    snapshot.set_state(cache, &given, ranges, mapping, list) catch |err| return fail(err);
    return .ok;
}

/// Bytes of pages that lie in files.
pub fn cache_mapped_bytes(cache: *Cache, out: *u64) callconv(.c) Status {
    out.* = snapshot.mapped_bytes(cache);
    return .ok;
}

/// The next token of a cache that holds its sinks, all of them and nothing else, gets `position`:
/// as if the positions between had been evicted.
pub fn cache_skip(cache: *Cache, position: u64) callconv(.c) Status {
    snapshot.skip(cache, position) catch |err| return fail(err);
    return .ok;
}

/// Overwrites rows of a tier, and hashes each page that came; `hashes` may be null.
pub fn cache_write_rows(
    cache: *Cache,
    tier: u32,
    first: u64,
    count: u64,
    pages: [*]const u8,
    hashes: ?[*]u64,
) callconv(.c) Status {
    snapshot.write(cache, tier, first, count, pages, hashes) catch |err| return fail(err);
    return .ok;
}

/// XXH64, seed 0, of `count` blocks of `bytes` that follow one another.
pub fn hash_pages(
    blocks: [*]const u8,
    bytes: u64,
    count: u64,
    hashes: [*]u64,
) callconv(.c) Status {
    snapshot.hash_pages(blocks, bytes, count, hashes) catch |err| return fail(err);
    return .ok;
}

/// Bytes of the pool that several caches hold together, each page counted once.
pub fn caches_held_bytes(
    caches: [*]const *Cache,
    count: u64,
    out: *u64,
) callconv(.c) Status {
    out.* = 0;
    out.* = snapshot.held_bytes(caches[0..@intCast(count)]) catch |err| return fail(err);
    return .ok;
}

/// Gives a pool that has none a file to which caches write pages that have no room: the descriptor
/// of an empty file, which from then on is the pool's to close. Where files cannot be mapped it is
/// an invalid argument. `write_bytes_max` is 0 for no limit.
pub fn pool_set_spill(pool: *Pool, file: i32, write_bytes_max: u64) callconv(.c) Status {
    if (!spill_file.offered or pool.spill != null) {
        message.set("spill: not on this system, or there is one already", .{});
        return fail(error.InvalidArgument);
    }
    pool.spill = Spill.create(gpa, file, write_bytes_max) catch |err| return fail(err);
    return .ok;
}

// ---- files as memory: a mapping lives until mapping_free and until no cache uses it any more ----

pub fn mapping_new(out: *?*Mapping) callconv(.c) Status {
    out.* = null;
    out.* = Mapping.create(gpa) catch |err| return fail(err);
    return .ok;
}

pub fn mapping_free(mapping: ?*Mapping) callconv(.c) void {
    if (mapping) |m| m.release();
}

/// Maps the first `bytes` of an open file (a descriptor; on Windows a handle), which must then stay
/// as it is and may be closed. Not in WebAssembly.
pub fn mapping_add_file(
    mapping: *Mapping,
    file: i64,
    bytes: u64,
    out_region: *u64,
) callconv(.c) Status {
    out_region.* = 0;
    out_region.* = mapping.add_file(file, bytes) catch |err| return fail(err);
    return .ok;
}

/// Says what `count` pages from `offset` on must hash to. All are checked before the first use of
/// a cache with rows of this mapping; if one does not match, every use is refused.
pub fn mapping_expect(
    mapping: *Mapping,
    region: u64,
    offset: u64,
    page_bytes: u64,
    hashes: [*]const u64,
    count: u64,
) callconv(.c) Status {
    mapping.expect(region, offset, page_bytes, hashes[0..@intCast(count)]) catch |err|
        return fail(err);
    return .ok;
}
