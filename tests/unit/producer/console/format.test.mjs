import assert from "node:assert/strict";
import { test } from "node:test";
import { count, duration, NONE, plural, rate, relative, share } from "../../../../producer/gateway/console/page/format.js";

const each = (name, show, cases) =>
  test(name, () => cases.forEach(([value, text]) => assert.equal(show(value), text)));

each("numbers are whole, grouped, and short where they are large", count, [
  [0, "0"], [7, "7"], [1234, "1,234"], [9999.6, "10,000"], [12_345, "12.3k"], [999_499, "999.5k"], [999_999, "1M"],
  [1.25e6, "1.3M"], [2e9, "2G"], [null, NONE], [undefined, NONE],
]);
each("rates keep decimals where they are small", rate, [
  [0, "0"], [0.0333, "0.033"], [0.5, "0.5"], [4.256, "4.26"], [42.55, "42.5"], [1392.2, "1,392"], [null, NONE],
]);
each("durations have the unit that fits", duration, [
  [0, "0 ms"], [0.0123, "12 ms"], [0.1, "0.1 s"], [0.85, "0.85 s"], [4.24, "4.2 s"], [10, "10 s"], [60, "60 s"],
  [99.6, "2 min"], [3540, "59 min"], [3599, "1 h"], [11_100, "3 h 5 min"], [190_800, "2 d 5 h"], [172_800, "2 d"],
  [-5, "0 ms"], [null, NONE],
]);
each("times are told from now", (at) => relative(at, 1000), [
  [1000, "now"], [999, "now"], [988, "12 s ago"], [998, "2 s ago"], [400, "10 min ago"], [1300, "in 5 min"],
]);
test("shares and plurals", () => {
  assert.equal(share(1, 3), "33 %");
  assert.equal(share(1, 0), NONE);
  assert.deepEqual([plural(1, "job"), plural(2, "job"), plural(0, "batch")], ["1 job", "2 jobs", "0 batches"]);
});
