/* What the tiles of a product have in common: the addresses of their rows, and what they fetch for the next tiles.
 *
 * Included by a kernel that has defined ROWS, the most rows of a tile.
 */
#define THIRDS ((ROWS + 2) / 3)

/* Rows of equal distance, each at its element at hand. The address of every third is kept: more are too many for the
 * registers of x86, and cost a tile of 11 rows as much as its twelfth. */
typedef struct {
  const char *thirds[THIRDS];
  int64_t stride; /* bytes */
} tile_rows;

INLINE tile_rows rows_from(const void *first, int64_t stride) {
  tile_rows rows = {.stride = stride};
  for (int i = 0; i < THIRDS; i++) rows.thirds[i] = (const char *)first + 3 * i * stride;
  return rows;
}

INLINE const char *row_of(const tile_rows *rows, int r) { return rows->thirds[r / 3] + r % 3 * rows->stride; }

/* Go on by `bytes`; num_rows is a constant. */
INLINE void advance(tile_rows *rows, int num_rows, int bytes) {
  UNROLL(4)
  for (int i = 0; 3 * i < num_rows; i++) {
    rows->thirds[i] += bytes;
    __asm__("" : "+r"(rows->thirds[i])); /* or the compiler keeps an address for every row after all */
  }
}

/* Ask for a line of the panels behind, of which a tile fetches `pace` bytes while it computes with a line of its own. One
 * that fetches all of it is too fast for the L1 cache, where it would drive out what is at hand. */
INLINE void fetch(const char *line, int pace) {
  if (pace < LINE)
    __builtin_prefetch(line);
  else
    __builtin_prefetch(line, 0, 2);
}
