import assert from "node:assert/strict";
import { test } from "node:test";
import { durationScale, linearScale, linePath, timeTicks } from "../../../../producer/gateway/console/page/plot_scale.js";

test("a linear axis goes from 0 to a round number above everything", () => {
  for (const max of [0, 0.004, 0.3, 1, 7.3, 99, 100, 1234, 5e6]) {
    const { ticks, place } = linearScale(max);
    assert.equal(ticks[0], 0);
    assert.ok(ticks.length >= 2 && ticks.length <= 6, `${max}: ${ticks}`);
    assert.ok(place(max) <= 1 + 1e-9 && place(0) === 0);
  }
  assert.deepEqual(linearScale(7.3).ticks, [0, 2, 4, 6, 8]);
});

test("an axis of durations has round ones around the values", () => {
  const { ticks, place } = durationScale(0.3, 69);
  assert.deepEqual(ticks, [0.1, 1, 10, 60, 600]);
  assert.ok(place(0.1) === 0 && place(600) === 1 && place(1) < place(10));
  assert.deepEqual(durationScale(2, 2).ticks, [1, 10]);
  assert.deepEqual(durationScale(0.00001, 1e9).ticks.length, 10);
  assert.equal(durationScale(0.00001, 1e9).place(1e9), 1);
});

test("quarters of an hour are labelled", () => {
  const begin = 1_800_000_100;
  const ticks = timeTicks(begin, begin + 3600);
  assert.equal(ticks.length, 4);
  for (const tick of ticks) assert.equal(new Date(tick * 1000).getMinutes() % 15, 0);
});

test("a line has gaps where there is no value, and a lonely point is a dot", () => {
  assert.equal(linePath([[0, 1], [1, 2], null, [3, 4], null]), "M0.0 1.0h0L1.0 2.0M3.0 4.0h0");
  assert.equal(linePath([null, null]), "");
});
