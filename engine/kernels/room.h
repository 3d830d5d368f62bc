/* Scratch memory of a thread. */
#ifndef PROMPTMILL_ROOM_H
#define PROMPTMILL_ROOM_H

#include <pthread.h>
#include <stdlib.h>

static pthread_key_t room_key;
static pthread_once_t room_once = PTHREAD_ONCE_INIT;

static void make_room_key(void) { pthread_key_create(&room_key, free); }

/* At least `size` bytes, of whatever content, grown when needed and kept for this thread's next call, until the thread
 * ends (as those of OpenMP do when fewer are asked for); NULL if there is no memory. One user a library: the next call has
 * the same bytes. */
static void *take_room(size_t size) {
  static _Thread_local void *room;
  static _Thread_local size_t room_size;
  if (size > room_size) {
    free(room);
    room = malloc(size);
    room_size = room ? size : 0;
    pthread_once(&room_once, make_room_key);
    pthread_setspecific(room_key, room); /* to be freed */
  }
  return room;
}

#endif
