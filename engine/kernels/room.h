/* Scratch memory of a thread. */
#ifndef PROMPTMILL_ROOM_H
#define PROMPTMILL_ROOM_H

#include <stdlib.h>

/* At least `size` bytes, of whatever content, grown when needed and kept for this thread's next call; NULL if there is no
 * memory. One user a library: the next call has the same bytes. */
static void *take_room(size_t size) {
  static _Thread_local void *room;
  static _Thread_local size_t room_size;
  if (size > room_size) {
    free(room);
    room = malloc(size);
    room_size = room ? size : 0;
  }
  return room;
}

#endif
