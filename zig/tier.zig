//! A tier: a run of consecutive positions in one pair of formats, held in pages of the pool. Page
//! n covers the positions from n * tokens_per_page on, in every kv head. Pages may be shared with
//! other tiers (table.zig); a tier never writes what another can see. Called by cache.zig
//! (which moves the bounds) and attend.zig (which reads); calls table.zig and pool.zig.
const std = @import("std");
const assert = std.debug.assert;
const Allocator = std.mem.Allocator;
const format = @import("format.zig");
const table_file = @import("table.zig");
const Half = format.Half;
const Mapping = @import("mapping.zig").Mapping;
const Pool = @import("pool.zig").Pool;
const Row = table_file.Row;
const Shape = table_file.Shape;
const Table = table_file.Table;

pub const Page = table_file.Page;

/// Rows [first, first + count) of a tier, one after the other in a region of a mapping.
pub const Piece = struct { first: u64, count: u64, region: u64, offset: u64 };

pub const Tier = struct {
    key: Half,
    value: Half,
    heads: usize,
    /// Positions that a page covers; its halves have at least as many slots.
    tokens_per_page: u64,
    /// Positions held: [start, end).
    start: u64 = 0,
    end: u64 = 0,
    /// Number of the first page held.
    first_page: u64 = 0,
    /// The rows of pages held, from `first_page` on; null when there are none.
    table: ?*Table = null,
    /// `table.live()`
    rows: []*Row = &.{},

    pub fn deinit(tier: *Tier, gpa: Allocator, pool: *Pool) void {
        if (tier.table) |table| table.release(gpa, pool, tier.shape());
        tier.* = undefined;
    }

    /// The same tokens in the same pages, for another holder.
    pub fn share(tier: *const Tier) Tier {
        var other = tier.*;
        if (tier.table) |table| other.table = table.retain();
        return other;
    }

    /// The positions [start, end) of this tier, in the same pages, for a holder that never writes.
    pub fn part(
        tier: *const Tier,
        gpa: Allocator,
        pool: *Pool,
        start: u64,
        end: u64,
    ) error{OutOfMemory}!Tier {
        assert(start >= tier.start and start < end and end <= tier.end);
        const wanted = tier.numbers(start, end);
        const from: usize = @intCast(wanted.first - tier.first_page);
        const count: usize = @intCast(wanted.end - wanted.first);
        const table: *Table = try .create(gpa, count);
        errdefer table.release(gpa, pool, tier.shape());
        table.share_rows(tier.rows[from..][0..count]);
        var other = tier.*;
        other.start = start;
        other.end = end;
        other.first_page = wanted.first;
        other.table = table;
        other.rows = table.live();
        return other;
    }

    /// Makes an empty tier hold [start, end), in new rows, which are zeros, and in rows that
    /// `pieces` says are in a mapping. On failure the tier is as it was.
    pub fn open(
        tier: *Tier,
        gpa: Allocator,
        pool: *Pool,
        start: u64,
        end: u64,
        mapping: ?*Mapping,
        pieces: []const Piece,
    ) !void {
        assert(tier.table == null);
        const wanted = tier.numbers(start, end);
        const count = std.math.cast(usize, wanted.end - wanted.first) orelse
            return error.OutOfMemory;
        if (count == 0) {
            if (pieces.len > 0) return error.InvalidArgument;
            tier.start = start;
            tier.end = end;
            return;
        }
        const table: *Table = try .create(gpa, count);
        errdefer table.release(gpa, pool, tier.shape());
        var next = wanted.first;
        for (pieces) |piece| {
            const in_order = piece.first >= next and piece.first <= wanted.end and
                piece.count <= wanted.end - piece.first;
            if (!in_order) return error.InvalidArgument;
            try tier.add_rows(gpa, pool, table, piece.first - next);
            try tier.add_mapped(gpa, table, mapping orelse return error.InvalidArgument, piece);
            next = piece.first + piece.count;
        }
        try tier.add_rows(gpa, pool, table, wanted.end - next);
        tier.table = table;
        tier.rows = table.live();
        tier.first_page = wanted.first;
        tier.start = start;
        tier.end = end;
        for (tier.rows, 0..) |row, i| {
            if (row.mapping != null) continue;
            row.claimed.store(tier.slots_before(tier.first_page + i, end), .release);
        }
    }

    fn add_rows(tier: *const Tier, gpa: Allocator, pool: *Pool, table: *Table, count: u64) !void {
        const rows = try gpa.alloc(*Row, @intCast(count));
        defer gpa.free(rows);
        try Row.create_all(gpa, pool, tier.shape(), rows);
        for (rows) |row| row.zero(tier.shape());
        table.rows.appendSliceAssumeCapacity(rows);
    }

    fn add_mapped(
        tier: *const Tier,
        gpa: Allocator,
        table: *Table,
        mapping: *Mapping,
        piece: Piece,
    ) !void {
        const row_bytes = tier.heads * tier.page_bytes();
        const bytes = try mapping.slice(piece.region, piece.offset, piece.count * row_bytes);
        for (0..@intCast(piece.count)) |i| {
            const base: Page = @alignCast(bytes.ptr + i * row_bytes);
            const row = try Row.create_mapped(gpa, tier.shape(), mapping, base, tier.page_bytes());
            table.rows.appendAssumeCapacity(row);
        }
    }

    pub fn half(tier: *const Tier, comptime side: format.Side) Half {
        return if (side == .key) tier.key else tier.value;
    }

    /// Where a half of page `number` begins.
    pub fn half_at(
        tier: *const Tier,
        comptime side: format.Side,
        number: u64,
        head: usize,
    ) [*]u8 {
        const page = tier.page_at(number, head);
        return if (side == .key) tier.keys_of(page) else tier.values_of(page);
    }

    pub fn tokens(tier: *const Tier) u64 {
        return tier.end - tier.start;
    }

    pub fn page_bytes(tier: *const Tier) usize {
        return tier.key.bytes() + tier.value.bytes();
    }

    pub fn shape(tier: *const Tier) Shape {
        return .{ .heads = tier.heads, .page_bytes = tier.page_bytes() };
    }

    pub fn page_count(tier: *const Tier) usize {
        return tier.rows.len * tier.heads;
    }

    pub fn overhead_bytes(tier: *const Tier) usize {
        const table = tier.table orelse return 0;
        return @sizeOf(Table) + table.rows.capacity * @sizeOf(*Row) +
            tier.rows.len * Row.overhead_bytes(tier.heads);
    }

    pub fn page_at(tier: *const Tier, number: u64, head: usize) Page {
        assert(number >= tier.first_page);
        return tier.rows[@intCast(number - tier.first_page)].pages()[head];
    }

    pub fn keys_of(_: *const Tier, page: Page) [*]u8 {
        return page;
    }

    pub fn values_of(tier: *const Tier, page: Page) [*]u8 {
        return page + tier.key.bytes();
    }

    const Numbers = struct { first: u64, end: u64 };

    fn numbers(tier: *const Tier, start: u64, end: u64) Numbers {
        if (start >= end) return .{ .first = 0, .end = 0 };
        return .{
            .first = start / tier.tokens_per_page,
            .end = (end - 1) / tier.tokens_per_page + 1,
        };
    }

    /// Slots of page `number` that lie before position `end`.
    fn slots_before(tier: *const Tier, number: u64, end: u64) u32 {
        return @intCast(@min(end - number * tier.tokens_per_page, tier.tokens_per_page));
    }

    /// Gets everything that moving the bounds to [start, end) and writing the positions
    /// [written, end) needs, without changing the tier. Pages that the move frees are counted on,
    /// so that a full pool still lets a window slide.
    pub fn reserve(
        tier: *Tier,
        gpa: Allocator,
        pool: *Pool,
        start: u64,
        end: u64,
        written: u64,
    ) !Change {
        const held = tier.numbers(tier.start, tier.end);
        const wanted = tier.numbers(start, end);
        const kept_first = @max(held.first, wanted.first);
        const kept_end = @max(kept_first, @min(held.end, wanted.end));
        const kept: usize = @intCast(kept_end - kept_first);
        const rows_added = std.math.cast(usize, wanted.end - wanted.first - kept) orelse
            return error.OutOfMemory;
        var change: Change = .{
            .start = start,
            .end = end,
            .first_page = wanted.first,
            // Of the rows held, those from `front` on, `kept` in number, stay.
            .front = if (kept > 0) @intCast(kept_first - held.first) else tier.rows.len,
            .kept = kept,
            .added = rows_added,
            .written = kept,
        };
        if (written < end) {
            tier.reserve_write(&change, written, .{ .first = kept_first, .end = kept_end });
        }
        errdefer if (change.claimed) |claimed| claimed.row.unclaim(claimed.slot);
        const dropped = tier.rows.len - kept;
        if (dropped == 0 and rows_added == 0 and !change.copies) return change;

        change.moves = true;

        // Rows that only this tier holds serve again.
        const private = if (tier.table) |table| table.alone() else false;
        var reusable: usize = 0;
        if (private) for ([_][]*Row{ change.front_of(tier), change.back_of(tier) }) |rows| {
            for (rows) |row| reusable += @intFromBool(row.alone());
        };
        const needed = rows_added + @intFromBool(change.copies);
        change.spare = try gpa.alloc(*Row, dropped + needed);
        errdefer gpa.free(change.spare);
        if (private) {
            try tier.table.?.rows.ensureUnusedCapacity(gpa, rows_added);
            tier.rows = tier.table.?.live(); // growing may have moved it
        } else if (kept + rows_added > 0) {
            change.table = try .create(gpa, kept + rows_added);
        }
        errdefer if (change.table) |table| table.release(gpa, pool, tier.shape());
        change.spare_len = needed -| reusable;
        try Row.create_all(gpa, pool, tier.shape(), change.spare[0..change.spare_len]);
        return change;
    }

    /// Makes sure that the slots of the first row to be written, if it is there already, are this
    /// tier's: they are if nobody else holds the row, or if it can claim them; else a copy is due.
    fn reserve_write(tier: *Tier, change: *Change, written: u64, kept: Numbers) void {
        const number = written / tier.tokens_per_page;
        if (number < kept.first or number >= kept.end) return;
        change.written = @intCast(number - kept.first);
        const row = tier.rows[change.front + change.written];
        if (tier.table.?.alone() and row.alone()) return;
        const slot: u32 = @intCast(written % tier.tokens_per_page);
        if (row.claim(slot, tier.slots_before(number, change.end))) {
            change.claimed = .{ .row = row, .slot = slot };
        } else {
            change.copies = true;
        }
    }

    /// Gives up a reservation.
    pub fn cancel(tier: *const Tier, gpa: Allocator, pool: *Pool, change: *Change) void {
        if (change.claimed) |claimed| claimed.row.unclaim(claimed.slot);
        if (change.table) |table| table.release(gpa, pool, tier.shape());
        change.free_spare(tier, gpa, pool);
        change.* = undefined;
    }

    /// Moves the bounds: pages outside them are given up, new ones are zeroed.
    pub fn commit(tier: *Tier, gpa: Allocator, pool: *Pool, change: *Change) void {
        if (change.moves) tier.move_rows(gpa, pool, change);
        tier.start = change.start;
        tier.end = change.end;
        tier.mark_claims(change.written);
        change.free_spare(tier, gpa, pool);
        change.* = undefined;
    }

    fn move_rows(tier: *Tier, gpa: Allocator, pool: *Pool, change: *Change) void {
        const shape_of_rows = tier.shape();
        if (change.kept + change.added == 0) {
            if (tier.table) |table| table.release(gpa, pool, shape_of_rows);
            tier.table = null;
            tier.rows = &.{};
            return;
        }
        if (change.table) |table| {
            table.share_rows(tier.rows[change.front..][0..change.kept]);
            if (tier.table) |old| old.release(gpa, pool, shape_of_rows);
            tier.table = table;
        } else {
            const table = tier.table.?;
            for ([_][]*Row{ change.front_of(tier), change.back_of(tier) }) |rows| {
                for (rows) |row| change.put(row, gpa, pool, shape_of_rows);
            }
            table.drop_back(change.back_of(tier).len);
            table.drop_front(change.front);
        }
        const table = tier.table.?;
        if (change.copies) {
            const place = &table.live()[change.written];
            const shared = place.*;
            place.* = change.take();
            place.*.copy(shared, shape_of_rows);
            shared.release(gpa, pool, shape_of_rows);
        }
        for (0..change.added) |i| {
            const row = change.take();
            // What an append fills to the last slot needs no zeros first.
            const number = change.first_page + change.kept + i;
            if (!tier.fills(change, number)) row.zero(shape_of_rows);
            table.rows.appendAssumeCapacity(row);
        }
        tier.first_page = change.first_page;
        tier.rows = table.live();
    }

    /// Whether a page lies within the bounds, to its last slot.
    fn fills(tier: *const Tier, change: *const Change, number: u64) bool {
        const first = number * tier.tokens_per_page;
        const end = first + @min(tier.key.slots, tier.value.slots);
        return first >= change.start and end <= change.end;
    }

    /// The slots up to the end are taken in every row from `first` on. A last row that nobody else
    /// holds is free behind the end, whatever was there.
    fn mark_claims(tier: *Tier, first: usize) void {
        if (tier.rows.len == 0) return;
        const last = tier.rows.len - 1;
        const private = tier.table.?.alone();
        for (@min(first, last)..tier.rows.len) |i| {
            const row = tier.rows[i];
            if (i < first and !(private and row.alone())) continue;
            row.claimed.store(tier.slots_before(tier.first_page + i, tier.end), .release);
        }
    }

    /// Whether the page table is what the bounds say.
    pub fn consistent(tier: *const Tier) bool {
        if (tier.start > tier.end) return false;
        const wanted = tier.numbers(tier.start, tier.end);
        if (tier.rows.len != wanted.end - wanted.first) return false;
        const table = tier.table orelse return tier.start == tier.end;
        if (tier.first_page != wanted.first or tier.rows.len == 0) return false;
        if (tier.rows.ptr != table.live().ptr or tier.rows.len != table.live().len) return false;
        const last = tier.rows[tier.rows.len - 1];
        return last.claimed.load(.acquire) >= tier.slots_before(wanted.end - 1, tier.end);
    }
};

/// A reserved move of a tier's bounds.
pub const Change = struct {
    start: u64,
    end: u64,
    first_page: u64,
    /// Of the rows held, `kept` stay, from `front` on; `added` come.
    front: usize,
    kept: usize,
    added: usize,
    /// The first row to be written: an index into the rows that stay and come.
    written: usize,
    /// That row is to be copied first.
    copies: bool = false,
    /// That row is written in place, from a slot on that was claimed.
    claimed: ?struct { row: *Row, slot: u32 } = null,
    /// Whether rows come, go or are replaced.
    moves: bool = false,
    /// What becomes the tier's table, if it cannot change the one it has.
    table: ?*Table = null,
    /// Rows not in the tier, with room for those that it will give up.
    spare: []*Row = &.{},
    spare_len: usize = 0,
    /// Of `spare`, so many have found their place.
    taken: usize = 0,

    /// The new rows of which the move fills every slot, as a tier of their own: they may be written
    /// before it, unseen.
    pub fn filled(change: *const Change, tier: *const Tier) ?Tier {
        if (change.copies or change.spare_len == 0) return null;
        const new = change.first_page + change.kept;
        const per_page = tier.tokens_per_page;
        const first = @max(tier.end, change.start);
        const from = std.math.divCeil(u64, first, per_page) catch unreachable;
        const begin = @max(new, from);
        var end = new + @min(change.spare_len, change.added);
        while (end > begin and !tier.fills(change, end - 1)) end -= 1;
        if (begin >= end) return null;
        var rows = tier.*;
        rows.first_page = begin;
        rows.start = begin * per_page;
        rows.end = end * per_page;
        rows.table = null;
        rows.rows = change.spare[@intCast(begin - new)..@intCast(end - new)];
        return rows;
    }

    fn front_of(change: *const Change, tier: *const Tier) []*Row {
        return tier.rows[0..change.front];
    }

    fn back_of(change: *const Change, tier: *const Tier) []*Row {
        return tier.rows[change.front + change.kept ..];
    }

    /// Takes a row that the tier gives up; what others hold is theirs alone from now on.
    fn put(change: *Change, row: *Row, gpa: Allocator, pool: *Pool, shape: Shape) void {
        if (!row.alone()) return row.release(gpa, pool, shape);
        change.spare[change.spare_len] = row;
        change.spare_len += 1;
    }

    /// New rows come first, in their order, then those that the tier has given up.
    fn take(change: *Change) *Row {
        defer change.taken += 1;
        return change.spare[change.taken];
    }

    fn free_spare(change: *Change, tier: *const Tier, gpa: Allocator, pool: *Pool) void {
        const left = change.spare[change.taken..change.spare_len];
        for (left) |row| row.release(gpa, pool, tier.shape());
        gpa.free(change.spare);
    }
};
