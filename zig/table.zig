//! Pages that several caches may hold at once, counted by reference.
//!
//! A **row** is the pages of all kv heads that cover the same positions; a **table** is a run of
//! rows. A fork shares whole tables, so it costs the same for any number of tokens; the first
//! holder that changes a shared table gets a table of its own, with the same rows.
//!
//! Bytes are shared by one rule: the tokens of a row lie in its slots from the left, and a slot
//! that no holder's tokens have claimed belongs to whoever claims it first. So the first holder
//! that appends writes on in place, unseen by the others, whose tokens end before; a holder that
//! comes later finds the slot claimed and copies the row first. Who holds a row alone may write
//! anywhere.
//!
//! Rows may also lie in a file (mapping.zig): these nobody writes, and who has to copies them.
//!
//! Counts are atomic: holders may be used by different threads. Called by tier.zig; calls pool.zig.
const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const Value = std.atomic.Value;
const Mapping = @import("mapping.zig").Mapping;
const Pool = @import("pool.zig").Pool;

pub const Page = [*]align(64) u8;

/// What a row of some tier is made of.
pub const Shape = struct { heads: usize, page_bytes: usize };

/// The pages (head) that cover a run of positions. The pointers follow the struct.
pub const Row = struct {
    references: Value(u32) align(@alignOf(Page)) = .init(1),
    /// Slots [0, claimed) may hold tokens of some holder.
    claimed: Value(u32) = .init(0),
    /// Where the pages are, if they are not of the pool.
    mapping: ?*Mapping = null,

    const alignment: std.mem.Alignment = .of(Row);

    comptime {
        assert(@sizeOf(Row) % @alignOf(Page) == 0 and @alignOf(Row) >= @alignOf(Page));
    }

    /// Bytes of a row beside its pages.
    pub fn overhead_bytes(heads: usize) usize {
        return @sizeOf(Row) + heads * @sizeOf(Page);
    }

    /// As many new rows as `out` has places, or none. What their pages hold is undefined.
    pub fn create_all(gpa: Allocator, pool: *Pool, shape: Shape, out: []*Row) !void {
        if (out.len == 0) return;
        // At once, so that the pool knows what is wanted before it gives anything.
        const all = try gpa.alloc(Page, out.len * shape.heads);
        defer gpa.free(all);
        try pool.acquire_pages(shape.page_bytes, all);
        errdefer pool.release_pages(shape.page_bytes, all);
        var made: usize = 0;
        errdefer for (out[0..made]) |row| gpa.free(row.allocation(shape.heads));
        for (out) |*place| {
            const bytes = try gpa.alignedAlloc(u8, alignment, overhead_bytes(shape.heads));
            const row: *Row = @ptrCast(bytes.ptr);
            row.* = .{};
            @memcpy(row.pages(), all[made * shape.heads ..][0..shape.heads]);
            place.* = row;
            made += 1;
        }
    }

    /// A row whose pages lie in a mapping, `stride` bytes from one to the next.
    pub fn create_mapped(
        gpa: Allocator,
        shape: Shape,
        mapping: *Mapping,
        base: Page,
        stride: usize,
    ) error{OutOfMemory}!*Row {
        const memory = try gpa.alignedAlloc(u8, alignment, overhead_bytes(shape.heads));
        const row: *Row = @ptrCast(memory.ptr);
        // All slots are taken, so that whoever wants to write has to copy.
        row.* = .{ .claimed = .init(std.math.maxInt(u32)), .mapping = mapping.retain() };
        for (row.pages()[0..shape.heads], 0..) |*page, head| {
            page.* = @alignCast(base + head * stride);
        }
        return row;
    }

    fn destroy(row: *Row, gpa: Allocator, pool: *Pool, shape: Shape) void {
        if (row.mapping) |mapping| {
            mapping.release();
        } else {
            pool.release_pages(shape.page_bytes, row.pages()[0..shape.heads]);
        }
        gpa.free(row.allocation(shape.heads));
    }

    fn allocation(row: *Row, heads: usize) []align(@alignOf(Row)) u8 {
        const bytes: [*]align(@alignOf(Row)) u8 = @ptrCast(row);
        return bytes[0..overhead_bytes(heads)];
    }

    pub fn pages(row: *const Row) [*]Page {
        return @ptrCast(@constCast(@as([*]const Row, @ptrCast(row)) + 1));
    }

    fn retain(row: *Row) void {
        const before = row.references.fetchAdd(1, .monotonic);
        assert(before > 0);
    }

    pub fn release(row: *Row, gpa: Allocator, pool: *Pool, shape: Shape) void {
        const before = row.references.fetchSub(1, .acq_rel);
        assert(before > 0);
        if (before == 1) row.destroy(gpa, pool, shape);
    }

    /// Whether one table alone holds this row, which then may be written and used again. That stays
    /// so until the table's holder shares.
    pub fn alone(row: *const Row) bool {
        return row.mapping == null and row.references.load(.acquire) == 1;
    }

    /// Takes the slots [start, end) of a row that others hold too, or says that somebody has some.
    pub fn claim(row: *Row, start: u32, end: u32) bool {
        return row.claimed.cmpxchgStrong(start, end, .acq_rel, .acquire) == null;
    }

    /// Gives back what `claim` took from `start` on.
    pub fn unclaim(row: *Row, start: u32) void {
        row.claimed.store(start, .release);
    }

    /// Fills a new row with the bytes of another.
    pub fn copy(target: *Row, source: *const Row, shape: Shape) void {
        for (target.pages()[0..shape.heads], source.pages()[0..shape.heads]) |to, from| {
            @memcpy(to[0..shape.page_bytes], from[0..shape.page_bytes]);
        }
    }

    pub fn zero(row: *Row, shape: Shape) void {
        for (row.pages()[0..shape.heads]) |page| @memset(page[0..shape.page_bytes], 0);
    }
};

/// A run of rows.
pub const Table = struct {
    references: Value(u32) = .init(1),
    rows: std.ArrayList(*Row) = .empty,
    /// Entries of `rows` that are gone; they are squeezed out now and then.
    skipped: usize = 0,

    pub fn create(gpa: Allocator, capacity: usize) error{OutOfMemory}!*Table {
        const table = try gpa.create(Table);
        errdefer gpa.destroy(table);
        table.* = .{ .rows = try .initCapacity(gpa, capacity) };
        return table;
    }

    pub fn retain(table: *Table) *Table {
        const before = table.references.fetchAdd(1, .monotonic);
        assert(before > 0);
        return table;
    }

    pub fn release(table: *Table, gpa: Allocator, pool: *Pool, shape: Shape) void {
        const before = table.references.fetchSub(1, .acq_rel);
        assert(before > 0);
        if (before > 1) return;
        for (table.live()) |row| row.release(gpa, pool, shape);
        table.rows.deinit(gpa);
        gpa.destroy(table);
    }

    pub fn alone(table: *const Table) bool {
        return table.references.load(.acquire) == 1;
    }

    pub fn live(table: *const Table) []*Row {
        return table.rows.items[table.skipped..];
    }

    /// Takes rows of another table in; there must be room.
    pub fn share_rows(table: *Table, rows: []const *Row) void {
        for (rows) |row| row.retain();
        table.rows.appendSliceAssumeCapacity(rows);
    }

    /// Forgets the first `count` rows; the caller has them.
    pub fn drop_front(table: *Table, count: usize) void {
        table.skipped += count;
        if (table.skipped * 2 <= table.rows.items.len) return;
        const rows = table.live();
        std.mem.copyForwards(*Row, table.rows.items[0..rows.len], rows);
        table.rows.items.len = rows.len;
        table.skipped = 0;
    }

    /// Forgets the last `count` rows; the caller has them.
    pub fn drop_back(table: *Table, count: usize) void {
        table.rows.items.len -= count;
    }
};

test "a claimed slot is nobody else's" {
    const gpa = std.testing.allocator;
    const pool = try Pool.create(gpa, .{});
    defer pool.release();
    const shape: Shape = .{ .heads = 2, .page_bytes = 4096 };
    var rows: [1]*Row = undefined;
    try Row.create_all(gpa, pool, shape, &rows);
    const row = rows[0];
    try std.testing.expect(row.alone());
    row.retain();
    try std.testing.expect(!row.alone());
    try std.testing.expect(row.claim(0, 5));
    try std.testing.expect(!row.claim(0, 3));
    try std.testing.expect(row.claim(5, 9));
    row.release(gpa, pool, shape);
    try std.testing.expect(row.alone());
    try std.testing.expectEqual(2 * 4096, pool.stats().bytes_in_use);
    row.release(gpa, pool, shape);
    try std.testing.expectEqual(0, pool.stats().bytes_in_use);
}
