//! The C ABI: every `pub fn` here becomes `kvz_<name>`, and nothing else is exported.
//!
//! Bindings never repeat a signature: `manifest.zig` reflects this file into JSON, which the
//! library returns from `kvz_manifest`, and the Python loaders (ctypes and wasmtime) build from
//! it. A caller's mistake is a status with a message, never an assert. Called by hosts; calls
//! cache.zig, pool.zig, quantize.zig, threads.zig, dispatch.zig.

const std = @import("std");
const attend_file = @import("attend.zig");
const cache_file = @import("cache.zig");
const config_file = @import("config.zig");
const dispatch = @import("dispatch.zig");
const gpa = @import("memory.zig").gpa;
const inspect = @import("inspect.zig");
const message = @import("message.zig");
const policy = @import("abi_policy.zig");
const pool_file = @import("pool.zig");
const quantization = @import("abi_quantize.zig");
const sequence = @import("abi_sequence.zig");
const slab_file = @import("slab.zig");
const snapshot = @import("abi_snapshot.zig");
const status_file = @import("status.zig");
const threads = @import("threads.zig");
const Config = config_file.Config;
const Input = @import("input.zig").Input;
const adopt = status_file.adopt;
const fail = status_file.fail;
const hand_out = status_file.hand_out;

pub const version: u32 = 1;

/// Values are permanent: append, never renumber.
pub const Status = enum(i32) {
    ok = 0,
    out_of_memory = 1,
    pool_exhausted = 2,
    invalid_argument = 3,
    not_finite = 4,
    not_representable = 5,
    abi_mismatch = 6,
    foreign_buffer = 7,
    corrupt = 8,
    damaged = 9,
};

/// How a tier stores its values.
pub const Format = enum(u32) {
    f32 = 0,
    f16 = 1,
    bf16 = 2,
    q8 = 3,
    q4 = 4,
    q2k = 5,
    q3k = 6,
    q4k = 7,
    q5k = 8,
    q6k = 9,
};

/// Element type of an input array.
pub const Dtype = enum(u32) { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

pub const CacheKind = enum(u32) { two_tier = 0, pooled = 1 };
pub const Rotation = enum(u32) { auto = 0, on = 1, off = 2 };
pub const MaskKind = enum(u32) { none = 0, boolean = 1, additive = 2 };

pub const PoolConfig = extern struct {
    /// `@sizeOf(PoolConfig)` as the caller knows it; a shorter struct gets defaults for the rest.
    size_bytes: u32 = @sizeOf(PoolConfig),
    /// Free buffers kept per size class; more are given back to their slab.
    max_free_per_class: u32 = 32,
    /// Hard limit on bytes handed out and kept free; 0 is no limit.
    max_bytes: u64 = 0,
    zero_on_release: u32 = 0,
    reserved: u32 = 0,
};

pub const PoolStats = extern struct {
    size_bytes: u32 = @sizeOf(PoolStats),
    reserved: u32 = 0,
    hits: u64 = 0,
    misses: u64 = 0,
    allocations: u64 = 0,
    returns: u64 = 0,
    drops: u64 = 0,
    /// Free buffers in the classes of 1, 4, 16, 64 and 256 KB, and in all exact page classes.
    free_1k: u64 = 0,
    free_4k: u64 = 0,
    free_16k: u64 = 0,
    free_64k: u64 = 0,
    free_256k: u64 = 0,
    free_pages: u64 = 0,
    bytes_in_use: u64 = 0,
    bytes_free: u64 = 0,
    /// What the operating system was asked for (slabs).
    bytes_reserved: u64 = 0,
    /// Highest bytes_in_use so far.
    bytes_high_water: u64 = 0,
    max_bytes: u64 = 0,
    /// 1 when slabs are backed by huge pages where the system grants them.
    huge_pages: u32 = 0,
    reserved_2: u32 = 0,
    /// In the spill file now, and written to it so far.
    bytes_spilled: u64 = 0,
    bytes_written: u64 = 0,
};

pub const CacheConfig = extern struct {
    size_bytes: u32 = @sizeOf(CacheConfig),
    kind: u32 = 0, // CacheKind
    num_kv_heads: u32 = 8,
    head_dim: u32 = 128,
    value_dim: u32 = 0, // 0 is head_dim
    tail_format: u32 = 1, // Format: f32, f16 or bf16
    key_format: u32 = 4, // Format
    value_format: u32 = 4, // Format
    max_tokens: u64 = 4096,
    tail_length: u64 = 256,
    migration_batch: u64 = 64,
    sink_tokens: u64 = 0,
    tokens_per_block: u64 = 64, // pooled only
    rotation: u32 = 0, // Rotation
    warm_format: u32 = 3, // Format whose values stand alone: f32, f16, bf16, q8 or q4
    warm_length: u64 = 0, // two_tier only; 0 is no warm tier
};

/// Where the values of `cache_append` lie: strides in elements, the innermost stride is 1.
pub const TokenLayout = extern struct {
    size_bytes: u32 = @sizeOf(TokenLayout),
    key_dtype: u32 = 0, // Dtype
    value_dtype: u32 = 0, // Dtype
    reserved: u32 = 0,
    key_token_stride: i64 = 0,
    key_head_stride: i64 = 0,
    value_token_stride: i64 = 0,
    value_head_stride: i64 = 0,
};

pub const AttendOptions = extern struct {
    size_bytes: u32 = @sizeOf(AttendOptions),
    causal: u32 = 1,
    /// Keys older than `window - 1` positions before the query are not seen; 0 is no window.
    window: u64 = 0,
    /// 0 is none.
    softcap: f32 = 0,
    mask_kind: u32 = 0, // MaskKind: u8 per entry, or f32 per entry
    /// Strides of the mask in entries; columns (live tokens, oldest first) are contiguous. 0
    /// broadcasts.
    mask_query_stride: i64 = 0,
    mask_head_stride: i64 = 0,
    mask: ?*const anyopaque = null,
    alibi_slopes: ?*const anyopaque = null, // f32 (query heads)
    sinks: ?*const anyopaque = null, // f32 (query heads)
    lse: ?*anyopaque = null, // out: f32 (query tokens, query heads)
    mass: ?*anyopaque = null, // out: f32 (query heads, live tokens)
    /// Live tokens that `mask` and `mass` were sized for; refused if the cache holds another
    /// number by now.
    live_tokens: u64 = 0,
};

/// Positions [start, end).
pub const Range = @import("kept.zig").Range;

/// One `cache_attend` of `attend_many`.
pub const AttendItem = extern struct {
    size_bytes: u32 = @sizeOf(AttendItem),
    query_tokens: u32 = 0,
    query_heads: u32 = 0,
    scale: f32 = 0,
    cache: ?*Cache = null,
    query: ?[*]const f32 = null,
    options: ?*const AttendOptions = null,
    out: ?[*]f32 = null,
};

/// One `cache_append` of `append_many`.
pub const AppendItem = extern struct {
    size_bytes: u32 = @sizeOf(AppendItem),
    reserved: u32 = 0,
    tokens: u64 = 0,
    cache: ?*Cache = null,
    keys: ?*const anyopaque = null,
    values: ?*const anyopaque = null,
    layout: ?*const TokenLayout = null,
};

pub const CacheStats = extern struct {
    size_bytes: u32 = @sizeOf(CacheStats),
    reserved: u32 = 0,
    total_tokens: u64 = 0,
    sink_tokens: u64 = 0,
    store_tokens: u64 = 0,
    tail_tokens: u64 = 0,
    next_position: u64 = 0,
    /// First live position that is not a sink.
    first_position: u64 = 0,
    /// Bytes of the pages held, slack included.
    sink_bytes: u64 = 0,
    store_bytes: u64 = 0,
    tail_bytes: u64 = 0,
    page_count: u64 = 0,
    evicted_tokens: u64 = 0,
    migrated_tokens: u64 = 0,
    /// Control structures beside the pages (page tables, the cache itself).
    overhead_bytes: u64 = 0,
    /// Between store and tail.
    warm_tokens: u64 = 0,
    warm_bytes: u64 = 0,
};

/// What the pages of a cache are: for each tier the tokens that a page covers, and the bytes that
/// the pages of all kv heads take.
pub const CacheLayout = extern struct {
    size_bytes: u32 = @sizeOf(CacheLayout),
    reserved: u32 = 0,
    sink_page_tokens: u64 = 0,
    sink_page_bytes: u64 = 0,
    store_page_tokens: u64 = 0,
    store_page_bytes: u64 = 0,
    tail_page_tokens: u64 = 0,
    tail_page_bytes: u64 = 0,
    warm_page_tokens: u64 = 0,
    warm_page_bytes: u64 = 0,
};

pub const Info = extern struct {
    size_bytes: u32 = @sizeOf(Info),
    cpu_count: u32 = 0,
    num_threads: u32 = 0,
    huge_pages: u32 = 0,
};

pub const Pool = pool_file.Pool;
pub const Cache = cache_file.Cache;

// ---- memory of the core, for hosts that cannot share theirs (WebAssembly) ----

/// 64-byte aligned memory, or null.
pub fn alloc(bytes: usize) callconv(.c) ?*anyopaque {
    const memory = gpa.alignedAlloc(u8, .@"64", @max(bytes, 1)) catch return null;
    return memory.ptr;
}

/// Takes back what `alloc` gave for the same `bytes`.
pub fn free(ptr: ?*anyopaque, bytes: usize) callconv(.c) void {
    const memory: [*]align(64) u8 = @ptrCast(@alignCast(ptr orelse return));
    gpa.free(memory[0..@max(bytes, 1)]);
}

// ---- pool: it lives until pool_free and until the last cache on it is freed ----

pub fn pool_new(config: *const PoolConfig, out: *?*Pool) callconv(.c) Status {
    out.* = null;
    const given = adopt(PoolConfig, config) catch |err| return fail(err);
    out.* = Pool.create(gpa, .{
        .max_free_per_class = given.max_free_per_class,
        .max_bytes = given.max_bytes,
        .zero_on_release = given.zero_on_release != 0,
    }) catch |err| return fail(err);
    return .ok;
}

pub fn pool_free(pool: ?*Pool) callconv(.c) void {
    if (pool) |p| p.release();
}

/// A buffer of the smallest class that holds `bytes`; its size comes back in `out_bytes`.
pub fn pool_acquire(
    pool: *Pool,
    bytes: u64,
    out: *?*anyopaque,
    out_bytes: *u64,
) callconv(.c) Status {
    out.* = null;
    out_bytes.* = 0;
    const buffer = pool.acquire(bytes) catch |err| return fail(err);
    out.* = buffer.ptr;
    out_bytes.* = buffer.len;
    return .ok;
}

pub fn pool_release(pool: *Pool, buffer: ?*anyopaque) callconv(.c) Status {
    const address: [*]u8 = @ptrCast(buffer orelse return fail(error.ForeignBuffer));
    pool.release_buffer(address) catch |err| return fail(err);
    return .ok;
}

/// Adds `count` free buffers of the class that holds `bytes`.
pub fn pool_prewarm(pool: *Pool, bytes: u64, count: u64) callconv(.c) Status {
    pool.prewarm(bytes, count) catch |err| return fail(err);
    return .ok;
}

/// Gives the free buffers back.
pub fn pool_clear(pool: *Pool) callconv(.c) void {
    pool.clear();
}

pub fn pool_stats(pool: *Pool, out: *PoolStats) callconv(.c) Status {
    return hand_out(PoolStats, out, pool.stats());
}

// ---- cache ----

pub fn cache_new(config: *const CacheConfig, pool: *Pool, out: *?*Cache) callconv(.c) Status {
    out.* = null;
    const given = adopt(CacheConfig, config) catch |err| return fail(err);
    const checked = Config.check(given) catch |err| return fail(err);
    out.* = Cache.create(gpa, pool, checked) catch |err| return fail(err);
    return .ok;
}

pub fn cache_free(cache: ?*Cache) callconv(.c) void {
    if (cache) |c| c.destroy();
}

/// Appends `tokens` tokens, or nothing. Without a layout keys and values are f32, contiguous
/// (token, head, dim).
pub fn cache_append(
    cache: *Cache,
    keys: *const anyopaque,
    values: *const anyopaque,
    tokens: u64,
    layout: ?*const TokenLayout,
) callconv(.c) Status {
    const given = sequence.inputs_of(cache, keys, values, layout) catch |err| return fail(err);
    cache.append(given.keys, given.values, tokens) catch |err| return fail(err);
    return .ok;
}

/// Attention of the newest `query_tokens` tokens: query (query_tokens, query_heads, head_dim) to
/// out (query_tokens, query_heads, value_dim).
pub fn cache_attend(
    cache: *Cache,
    query: [*]const f32,
    query_tokens: u32,
    query_heads: u32,
    scale: f32,
    options: ?*const AttendOptions,
    out: [*]f32,
) callconv(.c) Status {
    const item: AttendItem = .{
        .query_tokens = query_tokens,
        .query_heads = query_heads,
        .scale = scale,
        .cache = cache,
        .query = query,
        .options = options,
        .out = out,
    };
    const request = sequence.request_of(&item) catch |err| return fail(err);
    cache.verify() catch |err| return fail(err);
    attend_file.attend(cache, &request) catch |err| return fail(err);
    return .ok;
}

/// De-quantized rows of `tokens` live tokens from index `first` on (oldest first), each (tokens,
/// heads, dim).
pub fn cache_get(
    cache: *Cache,
    first: u64,
    tokens: u64,
    keys: [*]f32,
    values: [*]f32,
) callconv(.c) Status {
    cache.verify() catch |err| return fail(err);
    cache.get(first, tokens, keys, values) catch |err| return fail(err);
    return .ok;
}

/// Removes the newest `tokens` tokens; says how many there were.
pub fn cache_trim(cache: *Cache, tokens: u64, out_trimmed: *u64) callconv(.c) Status {
    out_trimmed.* = 0;
    out_trimmed.* = cache.trim(tokens) catch |err| return fail(err);
    return .ok;
}

pub fn cache_clear(cache: *Cache) callconv(.c) Status {
    cache.clear() catch |err| return fail(err);
    return .ok;
}

pub fn cache_stats(cache: *Cache, out: *CacheStats) callconv(.c) Status {
    return hand_out(CacheStats, out, inspect.stats(cache));
}

/// `corrupt` with a message where an invariant does not hold.
pub fn cache_check(cache: *Cache) callconv(.c) Status {
    inspect.check(cache) catch |err| return fail(err);
    return .ok;
}

/// A hash of all that is stored; equal digests mean equal states.
pub fn cache_digest(cache: *Cache, out: *u64) callconv(.c) Status {
    cache.verify() catch |err| return fail(err);
    out.* = @import("digest.zig").digest(cache);
    return .ok;
}

// ---- sequences: abi_sequence.zig ----

pub const cache_fork = sequence.cache_fork;
pub const cache_cut = sequence.cache_cut;
pub const cache_restore = sequence.cache_restore;
pub const cache_pin = sequence.cache_pin;
pub const cache_unpin = sequence.cache_unpin;
pub const cache_evict = sequence.cache_evict;
pub const cache_runs = sequence.cache_runs;
pub const cache_pins = sequence.cache_pins;
pub const cache_layout = sequence.cache_layout;
pub const cache_shared_bytes = sequence.cache_shared_bytes;
pub const attend_many = sequence.attend_many;
pub const append_many = sequence.append_many;
// ---- the state of a cache as numbers and bytes, and back: abi_snapshot.zig ----

pub const CacheState = snapshot.CacheState;
pub const TierState = snapshot.TierState;
pub const cache_state = snapshot.cache_state;
pub const cache_tier = snapshot.cache_tier;
pub const cache_read_rows = snapshot.cache_read_rows;
pub const cache_set_state = snapshot.cache_set_state;
pub const cache_skip = snapshot.cache_skip;
pub const cache_write_rows = snapshot.cache_write_rows;
pub const hash_pages = snapshot.hash_pages;
pub const caches_held_bytes = snapshot.caches_held_bytes;
pub const Mapping = snapshot.Mapping;
pub const MappedRows = snapshot.MappedRows;
pub const mapping_new = snapshot.mapping_new;
pub const mapping_add_file = snapshot.mapping_add_file;
pub const mapping_expect = snapshot.mapping_expect;
pub const mapping_free = snapshot.mapping_free;
pub const pool_set_spill = snapshot.pool_set_spill;
pub const cache_mapped_bytes = snapshot.cache_mapped_bytes;

// ---- precisions that change: abi_policy.zig ----

pub const cache_convert = policy.cache_convert;
pub const cache_quality = policy.cache_quality;

// ---- quantization by itself: abi_quantize.zig ----

pub const quantized_bytes = quantization.quantized_bytes;
pub const quantize = quantization.quantize;
pub const dequantize = quantization.dequantize;

// ---- process ----

pub fn set_num_threads(count: u32) callconv(.c) Status {
    if (count == 0 or count > threads.count_max) {
        message.set(
            "the number of threads is {d}; expected 1 to {d}",
            .{ count, threads.count_max },
        );
        return fail(error.InvalidArgument);
    }
    threads.set_thread_count(count);
    return .ok;
}

/// Name of the kernels in use.
pub fn isa() callconv(.c) [*:0]const u8 {
    return dispatch.current().name.ptr;
}

/// Names of the kernels that this CPU could run, best first; null ends the list.
pub fn isa_available(index: u32) callconv(.c) ?[*:0]const u8 {
    const level = dispatch.nth_supported(index) orelse return null;
    return level.name.ptr;
}

pub fn isa_select(name: [*:0]const u8) callconv(.c) Status {
    dispatch.select(std.mem.span(name)) catch |err| return fail(err);
    return .ok;
}

pub fn info(out: *Info) callconv(.c) Status {
    return hand_out(Info, out, .{
        .cpu_count = threads.cpu_count(),
        .num_threads = @intCast(threads.thread_count()),
        .huge_pages = @intFromBool(slab_file.huge_pages_offered()),
    });
}

/// The message of this thread's latest failure; valid until its next failure.
pub fn last_error() callconv(.c) [*:0]const u8 {
    return message.last();
}

/// This ABI as JSON.
pub fn manifest() callconv(.c) [*:0]const u8 {
    return @import("manifest.zig").json;
}
